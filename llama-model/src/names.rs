//! Parameters' names in our modules, which are those of the released code, and in other programs' files: tables that are used
//! both ways.

/// Our name and the Hugging Face name of each part; a layer's parts follow `layers.N.` and `model.layers.N.`.
const NAMES: [Pair; 3] = [("tok_embeddings", "model.embed_tokens"), ("norm", "model.norm"), ("output", "lm_head")];
const LAYER_NAMES: [Pair; 9] = [
    ("attention_norm", "input_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
];

/// The name in a Hugging Face file of the parameter with `path` in the model.
pub fn file_name(path: &str) -> Option<String> {
    rename(path, ("layers.", "model.layers."), &NAMES, &LAYER_NAMES)
}

/// The path in the model of the parameter called `name` in a Hugging Face file.
pub fn model_path(name: &str) -> Option<String> {
    let back = |table: &[Pair]| table.iter().map(|(ours, theirs)| (*theirs, *ours)).collect::<Vec<_>>();
    rename(name, ("model.layers.", "layers."), &back(&NAMES), &back(&LAYER_NAMES))
}

/// One name and the other.
pub(crate) type Pair = (&'static str, &'static str);

/// A weight's other name, by a table of its parts and of those in a layer, which follow `layers.0` and `layers.1`.
pub(crate) fn rename(name: &str, layers: Pair, parts: &[Pair], layer_parts: &[Pair]) -> Option<String> {
    let stem = name.strip_suffix(".weight")?;
    let find = |table: &[Pair], stem: &str| table.iter().find(|(from, _)| *from == stem).map(|(_, to)| *to);
    if let Some(rest) = stem.strip_prefix(layers.0) {
        let (layer, part) = rest.split_once('.')?;
        layer.parse::<usize>().ok()?;
        return Some(format!("{}{layer}.{}.weight", layers.1, find(layer_parts, part)?));
    }
    Some(format!("{}.weight", find(parts, stem)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_both_ways() {
        let stored = [
            ("tok_embeddings.weight", "model.embed_tokens.weight"),
            ("norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("layers.0.attention_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("layers.1.attention.wq.weight", "model.layers.1.self_attn.q_proj.weight"),
            ("layers.12.attention.wk.weight", "model.layers.12.self_attn.k_proj.weight"),
            ("layers.0.attention.wv.weight", "model.layers.0.self_attn.v_proj.weight"),
            ("layers.0.attention.wo.weight", "model.layers.0.self_attn.o_proj.weight"),
            ("layers.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
            ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight"),
            ("layers.0.feed_forward.w2.weight", "model.layers.0.mlp.down_proj.weight"),
            ("layers.0.feed_forward.w3.weight", "model.layers.0.mlp.up_proj.weight"),
        ];
        for (ours, theirs) in stored {
            assert_eq!(file_name(ours).as_deref(), Some(theirs));
            assert_eq!(model_path(theirs).as_deref(), Some(ours));
        }
        for unknown in ["layers.x.attention.wq.weight", "layers.0.attention.wz.weight", "norm.bias", "weight"] {
            assert_eq!(file_name(unknown), None);
        }
    }
}
