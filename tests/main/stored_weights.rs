//! Weights of a checkpoint in the form that they are stored in.

use std::sync::Arc;

use burn::tensor::DType;
use llama::model::backend::Bits;
use llama::model::formats::{self, Checkpoint, Extras, FileType, Format, ModelWeights, Weights};
use llama::model::shard::{Collective, Shard, Split, Team};
use llama::model::{LlamaConfig, WeightFormat};

use crate::support::{close, device_test, fixture, floats, scale};

device_test! {
    /// Loaded as it is stored, each matrix is in the shortest form that takes it and those with its input, and has its values.
    fn are_kept<B>(device) {
        let checkpoint = Checkpoint::open(&fixture("quants/model.gguf")).unwrap();
        let model = checkpoint.load::<B::InnerBackend>(None, &device, |_| ()).unwrap();
        let [first, second] = &model.layers[..] else { panic!("two layers") };
        let output = model.output.as_ref().unwrap();
        for (path, linear, bits, error) in [
            // Q4_1 and 5 bits; 2 and 3 bits; 4, 5 and 6 bits of K.
            ("layers.0.attention.wq.weight", &first.attention.wq, Some(Bits::Eight), 0.005),
            ("layers.0.attention.wv.weight", &first.attention.wv, Some(Bits::Eight), 0.005),
            ("layers.0.feed_forward.w1.weight", &first.feed_forward.w1, Some(Bits::Eight), 0.005),
            ("layers.1.attention.wq.weight", &second.attention.wq, Some(Bits::Eight), 0.005),
            // Q8_0 of any bytes: those of a real one, whose largest value is 127, stay what they are (below).
            ("output.weight", output, Some(Bits::Eight), 0.005),
            // bf16 beside f16; f32.
            ("layers.1.feed_forward.w1.weight", &second.feed_forward.w1, None, 0.0),
            ("layers.1.feed_forward.w3.weight", &second.feed_forward.w3, None, 0.0),
            ("layers.1.feed_forward.w2.weight", &second.feed_forward.w2, None, 0.0),
        ] {
            assert_eq!(linear.quantized.as_ref().map(|quantized| quantized.bits), bits, "{path}");
            let expected = checkpoint.weight(path, &linear.dims()).unwrap().convert::<f64>().to_vec::<f64>().unwrap();
            close(path, &floats(linear.dense()), &expected, error * scale(&expected));
        }
        // All types that are written.
        let (folder, extras) = (tempfile::tempdir().unwrap(), Extras { gguf: Vec::new(), files: Vec::new() });
        let source = Checkpoint::open(&fixture("gqa")).unwrap();
        for (dtype, format, error) in [
            (FileType::F32, WeightFormat::F32, 0.0),
            (FileType::Bf16, WeightFormat::Bf16, 0.0),
            (FileType::F16, WeightFormat::F16, 0.0),
            (FileType::Q8_0, WeightFormat::Q8, 1e-6),
            (FileType::Q4_0, WeightFormat::Q4, 1e-6),
        ] {
            let path = folder.path().join(format!("{dtype}.gguf"));
            formats::save(&source, source.config(), &path, Format::Gguf, dtype, &extras).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(checkpoint.stored_format(), format);
            let model = checkpoint.load::<B::InnerBackend>(None, &device, |_| ()).unwrap();
            let linear = &model.layers[1].feed_forward.w1;
            assert_eq!(linear.quantized.is_some(), matches!(format, WeightFormat::Q8 | WeightFormat::Q4), "{dtype}");
            if format.check::<B::InnerBackend>(&device).is_ok() && linear.quantized.is_none() {
                let dtypes = [(WeightFormat::Bf16, DType::BF16), (WeightFormat::F16, DType::F16)];
                let expected = dtypes.iter().find(|(of, _)| *of == format).map_or(DType::F32, |(_, dtype)| *dtype);
                assert_eq!(linear.weight.val().dtype(), expected);
            }
            // Those of `wq` come in another order.
            for (name, linear) in [("feed_forward.w1", linear), ("attention.wq", &model.layers[1].attention.wq)] {
                let weight = checkpoint.weight(&format!("layers.1.{name}.weight"), &linear.dims()).unwrap();
                let expected = weight.convert::<f64>().to_vec::<f64>().unwrap();
                close(name, &floats(linear.dense()), &expected, error * scale(&expected));
            }
        }
    }
}

/// A member that only loads.
struct Alone(Shard);

impl Collective for Alone {
    fn shard(&self) -> Shard {
        self.0
    }
    fn send(&self, _: usize, _: Vec<u8>) {
        unreachable!("nothing is sent while loading");
    }
    fn receive(&self, _: usize, _: usize) -> Option<Vec<u8>> {
        None
    }
    fn hear(&self, _: usize) -> Option<Vec<u8>> {
        None
    }
    fn missing(&self) -> Option<String> {
        None
    }
}

device_test! {
    /// A member of a team has its rows or columns of the blocks.
    fn are_kept_in_parts<B>(device) {
        let (folder, extras) = (tempfile::tempdir().unwrap(), Extras { gguf: Vec::new(), files: Vec::new() });
        let config = LlamaConfig { d_model: 64, n_heads: 4, n_kv_heads: 2, head_dim: 16, d_ff: 192, ..LlamaConfig::tiny(50) };
        let source = ModelWeights::new(&config.init::<B::InnerBackend>(3, &device).unwrap());
        for dtype in [FileType::Q8_0, FileType::Q4_0] {
            let path = folder.path().join(format!("{dtype}.gguf"));
            formats::save(&source, &config, &path, Format::Gguf, dtype, &extras).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            let whole = checkpoint.load::<B::InnerBackend>(None, &device, |_| ()).unwrap();
            for index in 0..2 {
                let shard = Shard { index, count: 2 };
                let team = Team::new(Arc::new(Alone(shard)));
                let part = checkpoint.load_in::<B::InnerBackend>(&team, None, &device, |_| ()).unwrap();
                let (whole, part) = (&whole.layers[0], &part.layers[0]);
                for (name, whole, part) in [
                    ("layers.0.attention.wk.weight", &whole.attention.wk, &part.attention.wk),
                    ("layers.0.attention.wo.weight", &whole.attention.wo, &part.attention.wo),
                    ("layers.0.feed_forward.w2.weight", &whole.feed_forward.w2, &part.feed_forward.w2),
                ] {
                    assert!(part.quantized.is_some(), "{dtype} {name}");
                    let expected = Split::of(name).cut(whole.dense().into_data(), shard);
                    let expected = expected.convert::<f64>().to_vec::<f64>().unwrap();
                    close(name, &floats(part.dense()), &expected, 0.0);
                }
            }
        }
    }
}
