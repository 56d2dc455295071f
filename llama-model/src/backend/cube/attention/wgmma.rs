//! The same three kernels on Hopper, by warp groups.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::super::hopper::{self, Left};
use super::{contiguous, empty_like, starts_or_none};
use crate::Precision;

/// Rows of a cube.
const ROWS: usize = 128;
/// Fewer queries would leave most of a cube's rows without work.
const FEWEST_QUERIES: usize = 64;

/// A variant of `wgmma.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Attention {
    kind: Kind,
    operand: DType,
    head_dim: usize,
    documents: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Forward,
    /// The gradient of the queries.
    Queries,
    /// The gradients of keys and values.
    Keys,
}

impl Attention {
    /// Rows that are looked at together: as many as the registers take.
    fn tile(self) -> usize {
        if self.head_dim == 64 || self.kind == Kind::Forward { 128 } else { 64 }
    }
}

impl hopper::Kernel for Attention {
    const NAME: &'static str = "attention";
    /// Two warp groups that multiply, and one that copies.
    const UNITS: u32 = 384;

    fn source(&self) -> (Vec<(&'static str, String)>, &'static str) {
        let Self { kind, operand, head_dim, documents } = *self;
        let kind = match kind {
            Kind::Forward => "FORWARD",
            Kind::Queries => "QUERIES",
            Kind::Keys => "KEYS",
        };
        let scores = hopper::wgmma(self.tile(), operand, Left::Shared { summed_inner: true }, true);
        let accumulate = hopper::wgmma(head_dim, operand, Left::Registers, false);
        let mut definitions = vec![
            (kind, String::new()),
            ("HEAD_DIM", head_dim.to_string()),
            ("TILE", self.tile().to_string()),
            ("DOCUMENTS", u8::from(documents).to_string()),
            ("WGMMA_SCORES(sums, a, b, add)", scores),
            ("WGMMA_ACCUMULATE(sums, a, b)", accumulate),
        ];
        if operand == DType::BF16 {
            definitions.push(("ROUND_BF16", String::new()));
        }
        (definitions, include_str!("wgmma.cu"))
    }

    /// The rows of a cube, once or twice, and two tiles of each of two operands.
    fn room(&self) -> usize {
        let fixed = if self.kind == Kind::Forward { ROWS } else { 2 * ROWS };
        1024 + (fixed + 4 * self.tile()) * self.head_dim * 2
    }
}

/// Whether these tensors (queries first) are taken: stored as operands are, heads of a width that the kernels know, queries enough.
pub(in crate::backend::cube) fn fits<R: CubeRuntime>(
    tensors: &[&CubeTensor<R>],
    starts: Option<&CubeTensor<R>>,
    precision: Precision,
) -> bool {
    let [_, q_len, _, head_dim] = tensors[0].shape().dims();
    precision != Precision::F32
        && hopper::supported(&tensors[0].client)
        && tensors.iter().all(|tensor| tensor.dtype == precision.dtype())
        && starts.is_none_or(|starts| starts.dtype == DType::I32)
        && (head_dim == 64 || head_dim == 128)
        && q_len >= FEWEST_QUERIES
}

/// What all three kernels are given.
struct Call {
    operand: DType,
    documents: bool,
    /// `[batch, q_len, n_heads, head_dim]`
    q: [usize; 4],
    /// `[batch, kv_len, n_kv_heads, head_dim]`
    k: [usize; 4],
    scale: f64,
}

impl Call {
    /// Launches a kernel on matrices: of the first ones a cube has rows, the others pass through in tiles.
    fn launch<R: CubeRuntime>(
        &self,
        kind: Kind,
        fixed: &[&CubeTensor<R>],
        passing: [&CubeTensor<R>; 2],
        tensors: Vec<CubeTensor<R>>,
    ) {
        let &Self { operand, documents, q: [batch, q_len, heads, head_dim], k: [_, kv_len, kv_heads, _], scale } = self;
        let kernel = Attention { kind, operand, head_dim, documents };
        let map = |tensor: &CubeTensor<R>, lines| {
            let [batch, len, heads, head_dim] = tensor.shape().dims();
            let matrix = burn_cubecl::ops::reshape(tensor.clone(), Shape::new([batch * len, heads * head_dim]));
            hopper::tensor_map(&matrix, lines)
        };
        let fixed = fixed.iter().map(|tensor| map(tensor, ROWS));
        let maps = fixed.chain(passing.map(|tensor| map(tensor, kernel.tile()))).collect();
        let cubes = match kind {
            Kind::Keys => batch * kv_heads * kv_len.div_ceil(ROWS),
            _ => batch * heads * q_len.div_ceil(ROWS),
        };
        let sizes = [batch, q_len, kv_len, heads, kv_heads].map(|size| size as u64);
        let constants = sizes.into_iter().chain([u64::from((scale as f32).to_bits())]).collect();
        let client = tensors[0].client.clone();
        // SAFETY: copies of what lies behind the end are zeros, and nothing is read or written behind it otherwise.
        unsafe { hopper::launch(&client, kernel, cubes, maps, tensors, constants) }
    }
}

/// [`LlamaBackend::causal_attention`](crate::LlamaBackend::causal_attention).
pub(in crate::backend::cube) fn forward<R: CubeRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    starts: Option<CubeTensor<R>>,
    scale: f64,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = contiguous([q, k, v]);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [batch, q_len, heads, _] = q.shape().dims();
    let out = empty_like(&q, q.shape(), q.dtype);
    let lse = empty_like(&q, Shape::new([batch, heads, q_len]), DType::F32);
    let call = Call { operand: q.dtype, documents, q: q.shape().dims(), k: k.shape().dims(), scale };
    call.launch(Kind::Forward, &[&q], [&k, &v], vec![starts, out.clone(), lse.clone()]);
    (out, lse)
}

/// [`LlamaBackend::causal_attention_backward`](crate::LlamaBackend::causal_attention_backward): `q`, `k`, `v`, the result and its gradient
/// in.
pub(in crate::backend::cube) fn backward<R: CubeRuntime>(
    inputs: [CubeTensor<R>; 5],
    starts: Option<CubeTensor<R>>,
    lse: CubeTensor<R>,
    scale: f64,
) -> [CubeTensor<R>; 3] {
    let [q, k, v, out, grad] = contiguous(inputs);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [lse] = contiguous([lse]);
    let [d_q, d_k, d_v] = [&q, &k, &v].map(|x| empty_like(x, x.shape(), x.dtype));
    let delta = empty_like(&lse, lse.shape(), DType::F32);
    let call = Call { operand: q.dtype, documents, q: q.shape().dims(), k: k.shape().dims(), scale };
    let tensors = vec![starts.clone(), out, lse.clone(), delta.clone(), d_q.clone()];
    call.launch(Kind::Queries, &[&q, &grad], [&k, &v], tensors);
    call.launch(Kind::Keys, &[&k, &v], [&q, &grad], vec![starts, lse, delta, d_k.clone(), d_v.clone()]);
    [d_q, d_k, d_v]
}
