//! SentencePiece's `.model` files: the fields of its `ModelProto` that BPE models use, with the numbers of its schema.

use prost::Message;

use super::{Kind, Piece};

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerProto>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerProto>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerProto {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    vocab_size: Option<i32>,
    #[prost(float, optional, tag = "10")]
    character_coverage: Option<f32>,
    #[prost(bool, optional, tag = "25")]
    split_digits: Option<bool>,
    #[prost(bool, optional, tag = "26")]
    allow_whitespace_only_pieces: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pad_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerProto {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// `ModelType::BPE`
const BPE: i32 = 2;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// Pieces, dummy prefix, escaped spaces.
pub(super) fn parse(bytes: &[u8]) -> Result<(Vec<Piece>, bool, bool), String> {
    let model = ModelProto::decode(bytes).map_err(|error| format!("not a SentencePiece model: {error}"))?;
    let trainer = model.trainer.unwrap_or_default();
    if trainer.model_type != Some(BPE) {
        return Err(format!("a SentencePiece model of type {:?}; only BPE (2) is read", trainer.model_type));
    }
    let normalizer = model.normalizer.unwrap_or_default();
    if !normalizer.precompiled_charsmap.unwrap_or_default().is_empty() {
        return Err("the model normalises characters; only the identity is supported, as in LLaMA".into());
    }
    if normalizer.remove_extra_whitespaces.unwrap_or(true) {
        return Err("the model removes extra spaces; only models that keep them are supported, as in LLaMA".into());
    }
    let pieces = model
        .pieces
        .into_iter()
        .map(|piece| {
            let text = piece.piece.unwrap_or_default();
            let kind = match piece.kind.unwrap_or(NORMAL) {
                NORMAL => Kind::Normal,
                UNKNOWN => Kind::Unknown,
                CONTROL => Kind::Control,
                BYTE => Kind::Byte,
                other => {
                    return Err(format!(
                        "piece `{text}` is of kind {other}; normal, unknown, control and byte are read"
                    ));
                }
            };
            Ok(Piece { text, score: piece.score.unwrap_or(0.0), kind })
        })
        .collect::<Result<_, _>>()?;
    Ok((pieces, normalizer.add_dummy_prefix.unwrap_or(true), normalizer.escape_whitespaces.unwrap_or(true)))
}

pub(super) fn write(pieces: &[Piece], dummy_prefix: bool, escape_spaces: bool) -> Vec<u8> {
    let piece = |piece: &Piece| PieceProto {
        piece: Some(piece.text.clone()),
        score: Some(piece.score),
        kind: Some(match piece.kind {
            Kind::Normal => NORMAL,
            Kind::Unknown => UNKNOWN,
            Kind::Control => CONTROL,
            Kind::Byte => BYTE,
        }),
    };
    let model = ModelProto {
        pieces: pieces.iter().map(piece).collect(),
        trainer: Some(TrainerProto {
            model_type: Some(BPE),
            vocab_size: Some(pieces.len() as i32),
            character_coverage: Some(1.0),
            split_digits: Some(true),
            allow_whitespace_only_pieces: Some(true),
            byte_fallback: Some(true),
            unk_id: Some(0),
            bos_id: Some(1),
            eos_id: Some(2),
            pad_id: Some(-1),
        }),
        normalizer: Some(NormalizerProto {
            name: Some("identity".into()),
            precompiled_charsmap: None,
            add_dummy_prefix: Some(dummy_prefix),
            remove_extra_whitespaces: Some(false),
            escape_whitespaces: Some(escape_spaces),
        }),
    };
    model.encode_to_vec()
}
