//! Weights of a checkpoint in the form that they are stored in.

use burn::tensor::DType;
use llama::model::WeightFormat;
use llama::model::backend::Bits;
use llama::model::formats::{self, Checkpoint, Extras, FileType, Format, Weights};

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
        // All types that are written; a block of 4 bits need not have both ends of its grid.
        let (folder, extras) = (tempfile::tempdir().unwrap(), Extras { gguf: Vec::new(), files: Vec::new() });
        let source = Checkpoint::open(&fixture("gqa")).unwrap();
        for (dtype, format, error) in [
            (FileType::F32, WeightFormat::F32, 0.0),
            (FileType::Bf16, WeightFormat::Bf16, 0.0),
            (FileType::F16, WeightFormat::F16, 0.0),
            (FileType::Q8_0, WeightFormat::Q8, 1e-6),
            (FileType::Q4_0, WeightFormat::Q4, 2e-3),
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
            let name = "layers.1.feed_forward.w1.weight";
            let expected = checkpoint.weight(name, &linear.dims()).unwrap().convert::<f64>().to_vec::<f64>().unwrap();
            close(name, &floats(linear.dense()), &expected, error * scale(&expected));
        }
    }
}
