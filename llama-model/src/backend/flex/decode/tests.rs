use half::{bf16, f16};

use super::super::vector::{Float, Plain};
use super::*;
use crate::backend::rounding::round;
use crate::backend::{Bits, QUANT_BLOCK};

/// Words and scales.
fn rounded(bits: Bits, weights: &[f32]) -> (Vec<i32>, Vec<f16>) {
    let blocks = weights.len() / QUANT_BLOCK;
    let (mut words, mut scales) = (vec![0; blocks * bits.words()], vec![f16::ZERO; blocks * bits.scales()]);
    round(bits, weights, bytemuck::cast_slice_mut(&mut words), &mut scales);
    (words, scales)
}

/// Every form against sums in f64, for rows that do not divide evenly, with SIMD and without, few rows and many.
fn plain(out: &mut [f32], x: &[f32], w: &[impl Float]) {
    let columns = Columns { out: Output(out.as_mut_ptr()), stride: out.len(), start: 0 };
    unsafe { floats::dots::<Plain>(columns, x, x.len(), w) }
}

#[test]
fn products_are_right_in_every_form() {
    let noise = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
    for (width, d_out) in [(32, 1), (64, 7), (96, 13), (576, 5), (37, 1), (69, 7)] {
        let x: Vec<f32> = (0..width * ROWS).map(noise).collect();
        let w: Vec<f32> = (0..width * d_out).map(|i| noise(i + 17)).collect();
        let short: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let half: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
        let check = |name: &str, weight: Stored, portable: &dyn Fn(&mut [f32], &[f32])| {
            let mut wide = vec![0.0; width * d_out];
            weight.widen(&mut wide);
            let mut found = vec![0.0; ROWS * d_out];
            let columns = |out: &mut Vec<f32>| Columns { out: Output(out.as_mut_ptr()), stride: d_out, start: 0 };
            let compare = |name: &str, found: &[f32]| {
                for (i, found) in found.iter().enumerate() {
                    let (x, w) = (&x[i / d_out * width..][..width], &wide[i % d_out * width..][..width]);
                    let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert!((sum - f64::from(*found)).abs() < 1e-3, "{name} {width}x{d_out}: {found} {sum}");
                }
            };
            let input = Input::new(&x, width, &[weight], Precision::F32);
            unsafe { dots(columns(&mut found), &input, weight) };
            compare(name, &found);
            // However many they are together, rows have the bits they have alone.
            for rows in [1, 2, 3, 6] {
                let (x, mut some) = (&x[..rows * width], vec![0.0; rows * d_out]);
                let input = Input::new(x, width, &[weight], Precision::F32);
                unsafe { dots(columns(&mut some), &input, weight) };
                assert!(some == found[..rows * d_out], "{name} {width}x{d_out}, {rows} rows");
            }
            unsafe { product(columns(&mut found), &x, width, weight, Precision::F32) };
            compare(name, &found);
            portable(&mut found[..d_out], &x[..width]);
            compare(name, &found[..d_out]);
            wide
        };
        assert_eq!(check("f32", Stored::F32(&w), &|out, x| plain(out, x, &w)), w);
        let wide = check("bf16", Stored::Bf16(&short), &|out, x| plain(out, x, &short));
        assert!(wide.iter().zip(&short).all(|(wide, w)| *wide == w.to_f32()));
        let wide = check("f16", Stored::F16(&half), &|out, x| plain(out, x, &half));
        assert!(wide.iter().zip(&half).all(|(wide, w)| *wide == w.to_f32()));
        if width % QUANT_BLOCK == 0 {
            let (words, scales) = rounded(Bits::Eight, &w);
            let bytes = bytemuck::cast_slice(&words);
            let wide = check("q8", Stored::Q8(bytes, &scales), &|out, x| q8_dots(out, x, bytes, &scales));
            assert!(wide.iter().zip(&w).all(|(wide, w)| (wide - w).abs() < 0.01));
            let (words, scales) = rounded(Bits::Four, &w);
            let bytes = bytemuck::cast_slice(&words);
            let wide = check("q4", Stored::Q4(bytes, &scales), &|out, x| q4_dots(out, x, bytes, &scales));
            assert!(wide.iter().zip(&w).all(|(wide, w)| (wide - w).abs() < 0.08));
            let (words, scales) = rounded(Bits::FourSymmetric, &w);
            let bytes = bytemuck::cast_slice(&words);
            let portable = |out: &mut [f32], x: &[f32]| q4_symmetric_dots(out, x, bytes, &scales);
            let wide = check("q4, symmetric", Stored::Q4Symmetric(bytes, &scales), &portable);
            assert!(wide.iter().zip(&w).all(|(wide, w)| (wide - w).abs() < 0.13));
        }
    }
}

/// A weight in every form that is shorter than f32.
struct Forms {
    short: Vec<bf16>,
    half: Vec<f16>,
    blocks: [(Vec<i32>, Vec<f16>); 3],
}

impl Forms {
    fn new(w: &[f32]) -> Self {
        Self {
            short: w.iter().map(|w| bf16::from_f32(*w)).collect(),
            half: w.iter().map(|w| f16::from_f32(*w)).collect(),
            blocks: [Bits::Eight, Bits::Four, Bits::FourSymmetric].map(|bits| rounded(bits, w)),
        }
    }

    fn all(&self) -> [Stored<'_>; 5] {
        let [eight, four, symmetric] = &self.blocks;
        [
            Stored::Bf16(&self.short),
            Stored::F16(&self.half),
            Stored::Q8(bytemuck::cast_slice(&eight.0), &eight.1),
            Stored::Q4(bytemuck::cast_slice(&four.0), &four.1),
            Stored::Q4Symmetric(bytemuck::cast_slice(&symmetric.0), &symmetric.1),
        ]
    }
}

/// More rows and columns than are multiplied or packed at a time, and not as many as some of them; more blocks than a piece has, and fewer.
#[test]
fn products_of_many_rows_are_right() {
    let noise = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
    for (rows, width, d_out) in
        [(9, 32, 1), (11, 1120, 21), (29, 608, 77), (245, 96, 37), (13, 2080, 16), (33, 64, 290)]
    {
        let x: Vec<f32> = (0..width * rows).map(noise).collect();
        let w: Vec<f32> = (0..width * d_out).map(|i| noise(i + 17)).collect();
        let forms = Forms::new(&w);
        for (form, weight) in forms.all().into_iter().enumerate() {
            let mut wide = vec![0.0; width * d_out];
            weight.widen(&mut wide);
            for (name, input) in inputs(&x, width, weight) {
                let mut found = vec![0.0; rows * d_out];
                let columns = Columns { out: Output(found.as_mut_ptr()), stride: d_out, start: 0 };
                unsafe { products(columns, &input, weight) };
                // Six times what rounding to bf16 makes of as many terms.
                let tolerance = if name.starts_with("bf16") { 8e-3 * (width as f64).sqrt() } else { 2e-3 };
                for (i, found) in found.iter().enumerate() {
                    let (x, w) = (&x[i / d_out * width..][..width], &wide[i % d_out * width..][..width]);
                    let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let off = (sum - f64::from(*found)).abs();
                    assert!(off < tolerance, "{rows}x{width}x{d_out} {form} {name}, {i}: {found} {sum}");
                }
            }
        }
    }
}

/// Many rows in every form that this CPU multiplies, and in those that are chosen for the weight.
fn inputs<'a>(xs: &'a [f32], d_in: usize, weight: Stored) -> Vec<(String, Input<'a>)> {
    let by_floats = |precision: Precision| (precision.to_string(), Input::new(xs, d_in, &[], precision));
    let mut inputs = vec![by_floats(Precision::F32), by_floats(Precision::Bf16)];
    #[cfg(target_arch = "x86_64")]
    {
        inputs.iter_mut().for_each(|(_, input)| input.many = None);
        let mut add = |name: String, many: Many| {
            inputs.push((name, Input { many: Some(many), ..Input::new(xs, d_in, &[], Precision::F32) }));
        };
        for unit in Bf16Unit::all() {
            add(format!("bf16 {unit:?}"), Many::Bf16(PackedRows::new(xs, d_in, unit)));
        }
        if let (Some(unit), Stored::Bf16(_)) = (Bf16Unit::unrounded(), weight) {
            add(format!("f32 {unit:?}"), Many::Bf16(PackedRows::new(xs, d_in, unit)));
        }
        for unit in simd::WordUnit::all() {
            add(format!("words {unit:?}"), Many::Words(WordRows::new(xs, d_in, unit)));
        }
    }
    for precision in [Precision::F32, Precision::Bf16] {
        inputs.push((format!("{precision}, chosen"), Input::new(xs, d_in, &[weight], precision)));
    }
    inputs
}

/// Whole numbers or not, zeros and the smallest numbers are harmless and what is not finite stays so.
#[test]
fn unusual_inputs_of_blocks_are_what_they_are() {
    for bits in [Bits::Eight, Bits::Four, Bits::FourSymmetric] {
        let (words, scales) = rounded(bits, &[1.0; 128]);
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let weight = match bits {
            Bits::Eight => Stored::Q8(bytemuck::cast_slice(bytes), &scales),
            Bits::Four => Stored::Q4(bytes, &scales),
            Bits::FourSymmetric => Stored::Q4Symmetric(bytemuck::cast_slice(bytes), &scales),
        };
        let product = |x: &[f32]| {
            let mut out = [0.0f32; 2];
            let columns = Columns { out: Output(out.as_mut_ptr()), stride: 2, start: 0 };
            unsafe { dots(columns, &Input::new(x, 64, &[weight], Precision::F32), weight) };
            out
        };
        // Of every form the first row, whatever the others are.
        let many = |x: &[f32]| {
            let x = [x, &[1.0; 64 * ROWS]].concat();
            let first = |(name, input): (String, Input)| {
                let mut out = [0.0f32; 2 * (ROWS + 1)];
                let columns = Columns { out: Output(out.as_mut_ptr()), stride: 2, start: 0 };
                unsafe { products(columns, &input, weight) };
                assert!(out[2..].iter().all(|sum| (sum - 64.0).abs() < 0.5), "{bits:?} {name}: {out:?}");
                (name, [out[0], out[1]])
            };
            inputs(&x, 64, weight).into_iter().map(first).collect::<Vec<_>>()
        };
        assert_eq!(product(&[0.0; 64]), [0.0; 2]);
        assert!(many(&[0.0; 64]).iter().all(|(_, sums)| *sums == [0.0; 2]));
        assert!(product(&[1e-38; 64]).iter().all(|sum| sum.abs() < 1e-30));
        for huge in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut x = [1.0; 64];
            x[40] = huge;
            assert!(product(&x).iter().all(|sum| !sum.is_finite()), "{bits:?} {huge}");
            for (name, sums) in many(&x) {
                assert!(sums.iter().all(|sum| !sum.is_finite()), "{bits:?} {name} {huge}");
            }
        }
    }
}

/// The forms with SIMD and without give the same values.
#[test]
fn widening_by_hand_is_widening() {
    let weights: Vec<f32> = (0..96 * 32).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect();
    for bits in [Bits::Eight, Bits::Four, Bits::FourSymmetric] {
        let (words, scales) = rounded(bits, &weights);
        let mut found = vec![0.0; weights.len()];
        let mut plain = found.clone();
        match bits {
            Bits::Eight => {
                Stored::Q8(bytemuck::cast_slice(&words), &scales).widen(&mut found);
                super::super::stored::widen_q8(&mut plain, bytemuck::cast_slice(&words), &scales);
            }
            Bits::Four => {
                Stored::Q4(bytemuck::cast_slice(&words), &scales).widen(&mut found);
                super::super::stored::widen_q4(&mut plain, bytemuck::cast_slice(&words), &scales);
            }
            Bits::FourSymmetric => {
                Stored::Q4Symmetric(bytemuck::cast_slice(&words), &scales).widen(&mut found);
                super::super::stored::widen_q4_symmetric(&mut plain, bytemuck::cast_slice(&words), &scales);
            }
        }
        assert!(found.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

/// No rows, pieces that are whole and others, several that are packed at a time, in every form and precision, alone and added to what is there.
#[test]
fn gradients_of_inputs_are_right_in_every_form() {
    let noise = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
    for (tokens, d_out, d_in) in [(0, 300, 32), (1, 1, 32), (5, 300, 96), (33, 70, 608), (400, 40, 64), (3, 2200, 32)] {
        let grads: Vec<f32> = (0..tokens * d_out).map(noise).collect();
        let w: Vec<f32> = (0..d_out * d_in).map(|i| noise(i + 17)).collect();
        let forms = Forms::new(&w);
        for (form, weight) in [Stored::F32(&w)].into_iter().chain(forms.all()).enumerate() {
            let mut wide = vec![0.0; d_out * d_in];
            weight.widen(&mut wide);
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 8e-3), (Precision::F16, 1e-3)] {
                for before in [None, Some(2.0)] {
                    let mut found = vec![before.unwrap_or(f32::NAN); tokens * d_in];
                    input_gradient(&mut found, &grads, weight, d_in, precision, before.is_some());
                    for (i, found) in found.iter().enumerate() {
                        let (grads, column) =
                            (&grads[i / d_in * d_out..][..d_out], wide[i % d_in..].iter().step_by(d_in));
                        let sum: f64 = grads.iter().zip(column).map(|(g, w)| f64::from(*g) * f64::from(*w)).sum();
                        let off = (sum + f64::from(before.unwrap_or(0.0)) - f64::from(*found)).abs();
                        let most = tolerance * (d_out as f64).sqrt();
                        assert!(
                            off < most,
                            "{tokens}x{d_out}x{d_in} {form} {precision} {before:?}, {i}: {found} {sum}"
                        );
                    }
                }
            }
        }
    }
}
