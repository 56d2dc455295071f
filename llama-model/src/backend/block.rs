//! A transformer block as one operation with a hand-written backward (paper, section 2.4): what is expensive is kept,
//! what is cheap is computed again.
//!
//! ```text
//! h   = x + wo · attention(rotary(wq · n), rotary(wk · n), wv · n)   with n = rms_norm(x)
//! out = h + w2 · swiglu(w1 · m, w3 · m)                              with m = rms_norm(h)
//! ```
//!
//! Written once on backend primitives, for all backends. Of a model that is divided, `n` and `m` are gathered before the products that read them, and what
//! `wo` and `w2` give is summed; see [`mod@crate::shard`].

use burn::tensor::TensorMetadata;
use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};

use super::{AttentionSaved, AttentionSpec, LlamaBackend, Matrix};
use crate::shard::{Pending, Team};
use crate::{Compute, Precision, Recompute};

/// The nine parameters of a block, or one thing for each of them; the gains of its norms may be of another type.
#[derive(Clone, Debug)]
pub struct BlockWeights<T, G = T> {
    /// Gain of the norm before attention, `[d_model]`.
    pub attention_norm: G,
    /// `[n_heads · head_dim, d_model]`
    pub wq: T,
    /// `[n_kv_heads · head_dim, d_model]`
    pub wk: T,
    /// `[n_kv_heads · head_dim, d_model]`
    pub wv: T,
    /// `[d_model, n_heads · head_dim]`
    pub wo: T,
    /// Gain of the norm before the feed-forward network, `[d_model]`.
    pub ffn_norm: G,
    /// Gate, `[d_ff, d_model]`.
    pub w1: T,
    /// Back, `[d_model, d_ff]`.
    pub w2: T,
    /// Up, `[d_ff, d_model]`.
    pub w3: T,
}

impl<T, G> BlockWeights<T, G> {
    /// The matrices changed, the gains of the norms as they are.
    pub fn map_matrices<U>(self, f: impl FnMut(T) -> U) -> BlockWeights<U, G> {
        let Self { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = self;
        let [wq, wk, wv, wo, w1, w2, w3] = [wq, wk, wv, wo, w1, w2, w3].map(f);
        BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 }
    }
}

impl<T> BlockWeights<T> {
    /// In the order of the fields.
    pub fn into_array(self) -> [T; 9] {
        let Self { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = self;
        [attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3]
    }

    /// The same for each.
    pub fn map<U>(self, f: impl FnMut(T) -> U) -> BlockWeights<U> {
        BlockWeights::from(self.into_array().map(f))
    }
}

impl<T> From<[T; 9]> for BlockWeights<T> {
    fn from([attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3]: [T; 9]) -> Self {
        Self { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 }
    }
}

/// What a block needs beside its weights.
#[derive(Clone, Debug)]
pub struct BlockSpec<B: Backend> {
    /// Cosines of the positions, `[seq_len, head_dim / 2]`.
    pub cos: FloatTensor<B>,
    /// Sines of the positions, `[seq_len, head_dim / 2]`.
    pub sin: FloatTensor<B>,
    /// First token of each token's document, `[batch, seq_len]`; none lets a token attend to the documents before its own.
    pub starts: Option<IntTensor<B>>,
    /// Sequences; `x` has `batch · seq_len` rows, or this member's part of them.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in both norms.
    pub eps: f64,
    /// Precision, and what is kept.
    pub compute: Compute,
    /// Who has the other parts of a model that is divided.
    pub team: Team,
}

impl<B: Backend> BlockSpec<B> {
    /// Rows of all members, of which this one has some; for what only products read.
    fn begin_gather(&self, x: FloatTensor<B>) -> Pending<B> {
        self.team.begin_gather(x, self.batch * self.seq_len, self.compute.precision)
    }

    fn gather(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        self.team.end(self.begin_gather(x))
    }
}

/// The keys and values of a block, `[batch, capacity, n_kv_heads, head_dim]` each.
#[derive(Clone, Debug)]
pub struct BlockCache<B: Backend> {
    /// Turned by their positions.
    pub keys: FloatTensor<B>,
    /// As many.
    pub values: FloatTensor<B>,
    /// Positions in use.
    pub len: usize,
}

/// What the forward keeps for the backward.
#[derive(Clone, Debug)]
pub struct BlockSaved<B: Backend> {
    x: FloatTensor<B>,
    /// With the weights as products read them, so that they are rounded once for both directions.
    inner: Option<(Activations<B>, Weights<B>)>,
}

/// What is between a block's input and output. The optional ones are cheap to make again.
#[derive(Clone, Debug)]
struct Activations<B: Backend> {
    attention_norm: Option<Norm<B>>,
    attention: AttentionSaved<B>,
    h: FloatTensor<B>,
    ffn_norm: Option<Norm<B>>,
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    product: Option<FloatTensor<B>>,
}

/// A norm's result and one reciprocal per row.
type Norm<B> = (FloatTensor<B>, FloatTensor<B>);

type Weights<B> = BlockWeights<FloatTensor<B>>;

impl<B: LlamaBackend> Activations<B> {
    fn new(x: FloatTensor<B>, weights: &Weights<B>, spec: &BlockSpec<B>) -> Self {
        let &BlockSpec { batch, seq_len, head_dim, .. } = spec;
        let precision = spec.compute.precision;
        let heads = |x: FloatTensor<B>| {
            let width = x.shape()[1];
            B::float_reshape(x, [batch, seq_len, width / head_dim, head_dim].into())
        };
        let rotary = |x| B::rotary(x, spec.cos.clone(), spec.sin.clone(), false);

        let attention_norm = norm::<B>(x.clone(), &weights.attention_norm, spec);
        let n = spec.gather(attention_norm.0.clone());
        let [q, k, v] = project::<B, 3>(&n, [&weights.wq, &weights.wk, &weights.wv], precision).map(heads);
        let (q, k) = (rotary(q), rotary(k));
        let attention_spec = AttentionSpec::new(head_dim, precision);
        let (out, lse) = B::causal_attention(q.clone(), k.clone(), v.clone(), spec.starts.clone(), attention_spec);
        let attention = AttentionSaved { q, k, v, starts: spec.starts.clone(), out, lse, spec: attention_spec };
        let back = B::project(attention.rows(), weights.wo.clone(), precision);
        let h = B::add_residual(spec.team.scatter_sum::<B>(back), x);

        let ffn_norm = norm::<B>(h.clone(), &weights.ffn_norm, spec);
        let m = spec.gather(ffn_norm.0.clone());
        let [gate, up] = project::<B, 2>(&m, [&weights.w1, &weights.w3], precision);
        let product = Some(B::swiglu(gate.clone(), up.clone()));
        Self { attention_norm: Some(attention_norm), attention, h, ffn_norm: Some(ffn_norm), gate, up, product }
    }

    /// The SwiGLU product, as it is or made again.
    fn product(&self) -> FloatTensor<B> {
        self.product.clone().unwrap_or_else(|| B::swiglu(self.gate.clone(), self.up.clone()))
    }

    fn output(&self, weights: &Weights<B>, spec: &BlockSpec<B>) -> FloatTensor<B> {
        let back = B::project(self.product(), weights.w2.clone(), spec.compute.precision);
        B::add_residual(spec.team.scatter_sum::<B>(back), self.h.clone())
    }
}

impl<B: Backend> AttentionSaved<B> {
    /// The result as the rows that the next projection takes.
    fn rows(&self) -> FloatTensor<B> {
        rows::<B>(self.out.clone())
    }
}

/// Projections of one input.
fn project<B: LlamaBackend, const N: usize>(
    x: &FloatTensor<B>,
    weights: [&FloatTensor<B>; N],
    precision: Precision,
) -> [FloatTensor<B>; N] {
    let weights = weights.into_iter().cloned().collect();
    let results = B::project_all(x.clone(), weights, precision);
    results.try_into().unwrap_or_else(|_| unreachable!("each weight has a result"))
}

/// A norm of the residual stream, which only products read.
fn norm<B: LlamaBackend>(x: FloatTensor<B>, gain: &FloatTensor<B>, spec: &BlockSpec<B>) -> Norm<B> {
    B::rms_norm_operand(x, gain.clone(), spec.eps, spec.compute.precision)
}

/// `[batch, seq_len, heads, head_dim]` as `[batch · seq_len, heads · head_dim]`.
fn rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, seq_len, heads, head_dim] = x.shape().dims();
    B::float_reshape(x, [batch * seq_len, heads * head_dim].into())
}

/// The block's result.
///
/// # Shapes
/// `x [batch · seq_len, d_model]`, result as `x`.
pub fn forward<B: LlamaBackend>(x: FloatTensor<B>, weights: &Weights<B>, spec: &BlockSpec<B>) -> FloatTensor<B> {
    let inner = Activations::new(x, weights, spec);
    inner.output(weights, spec)
}

/// The block's result for positions that continue the sequences of a cache, and the cache with them.
///
/// # Shapes
/// `x [batch · seq_len, d_model]`, result as `x`.
pub fn cached<B: LlamaBackend>(
    x: FloatTensor<B>,
    weights: BlockWeights<Matrix<B>, FloatTensor<B>>,
    cache: BlockCache<B>,
    spec: &BlockSpec<B>,
) -> (FloatTensor<B>, BlockCache<B>) {
    let &BlockSpec { batch, seq_len, head_dim, eps, ref compute, ref team, .. } = spec;
    let precision = compute.precision;
    let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = weights;
    let heads = |x: FloatTensor<B>| {
        let width = x.shape()[1];
        B::float_reshape(x, [batch, seq_len, width / head_dim, head_dim].into())
    };
    let rotary = |x| B::rotary(x, spec.cos.clone(), spec.sin.clone(), false);

    let (n, _) = B::rms_norm(x.clone(), attention_norm, eps);
    let [q, k, v] = Matrix::project_all(n, [wq, wk, wv], precision).map(heads);
    let keys = B::cache_write(cache.keys, rotary(k), cache.len);
    let values = B::cache_write(cache.values, v, cache.len);
    let cache = BlockCache::<B> { keys, values, len: cache.len + seq_len };
    let spec = AttentionSpec::new(head_dim, precision);
    let out = B::cached_attention(rotary(q), cache.keys.clone(), cache.values.clone(), cache.len, spec);
    let [out] = Matrix::project_all(rows::<B>(out), [wo], precision);
    let h = B::add_residual(team.sum::<B>(out), x);

    let (m, _) = B::rms_norm(h.clone(), ffn_norm, eps);
    let [gate, up] = Matrix::project_all(m, [w1, w3], precision);
    let [back] = Matrix::project_all(B::swiglu(gate, up), [w2], precision);
    (B::add_residual(team.sum::<B>(back), h), cache)
}

/// The matrices as products read them.
fn operands<B: LlamaBackend>(weights: Weights<B>, spec: &BlockSpec<B>) -> Weights<B> {
    let BlockWeights { wq, wk, wv, wo, w1, w2, w3, .. } = weights.clone();
    let mut operands = B::operands(vec![wq, wk, wv, wo, w1, w2, w3], spec.compute.precision).into_iter();
    weights.map_matrices(|_| operands.next().expect("each matrix has its operand"))
}

/// The block's result, and what `spec` keeps for [`backward`].
pub fn forward_saving<B: LlamaBackend>(
    x: FloatTensor<B>,
    weights: &Weights<B>,
    spec: &BlockSpec<B>,
) -> (FloatTensor<B>, BlockSaved<B>) {
    let weights = operands::<B>(weights.clone(), spec);
    let inner = Activations::new(x.clone(), &weights, spec);
    let out = inner.output(&weights, spec);
    let inner = match spec.compute.recompute {
        Recompute::None => Some(inner),
        Recompute::Selective => Some(Activations { attention_norm: None, ffn_norm: None, product: None, ..inner }),
        Recompute::Full => None,
    };
    (out, BlockSaved { x, inner: inner.map(|inner| (inner, weights)) })
}

/// Gradients of those weights that are wanted, by those of their results; all read the input `x`.
fn gradients<B: LlamaBackend, const N: usize>(
    grads: [(bool, &FloatTensor<B>); N],
    x: FloatTensor<B>,
    precision: Precision,
) -> [Option<FloatTensor<B>>; N] {
    let of_wanted = grads.iter().filter(|(wanted, _)| *wanted).map(|(_, grad)| (*grad).clone()).collect();
    let mut gradients = B::project_backward_weights(of_wanted, x, precision).into_iter();
    grads.map(|(wanted, _)| if wanted { gradients.next() } else { None })
}

/// Gradients of [`forward`] for `x` and for those weights that are `wanted`.
pub fn backward<B: LlamaBackend>(
    saved: BlockSaved<B>,
    weights: &Weights<B>,
    spec: &BlockSpec<B>,
    wanted: &BlockWeights<bool>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, BlockWeights<Option<FloatTensor<B>>>) {
    let precision = spec.compute.precision;
    let input = |pairs: &[(&FloatTensor<B>, &FloatTensor<B>)], dtype| {
        let pairs = pairs.iter().map(|(grad, weight)| ((*grad).clone(), (*weight).clone())).collect();
        B::project_backward_input(pairs, precision, dtype)
    };
    let BlockSaved { x, inner } = saved;
    let (inner, weights) = inner.unwrap_or_else(|| {
        let weights = operands::<B>(weights.clone(), spec);
        (Activations::new(x.clone(), &weights, spec), weights)
    });
    // What other members have is on its way while what is here is computed.

    // The feed-forward network, from its end.
    let d_out = spec.begin_gather(B::operand(grad.clone(), precision));
    let product = inner.product();
    let Activations { attention_norm, attention, h, ffn_norm, gate, up, product: kept } = inner;
    drop(kept);
    let (m, inv_rms) = ffn_norm.unwrap_or_else(|| norm::<B>(h.clone(), &weights.ffn_norm, spec));
    let m = spec.begin_gather(m);
    let d_out = spec.team.end(d_out);
    let [w2] = gradients::<B, 1>([(wanted.w2, &d_out)], product, precision);
    let d_product = input(&[(&d_out, &weights.w2)], gate.dtype());
    let (d_gate, d_up) = B::swiglu_backward(gate, up, d_product);
    drop(d_out);
    let m = spec.team.end(m);
    let d_m = spec.team.begin_scatter_sum::<B>(input(&[(&d_gate, &weights.w1), (&d_up, &weights.w3)], h.dtype()));
    let [w1, w3] = gradients::<B, 2>([(wanted.w1, &d_gate), (wanted.w3, &d_up)], m, precision);
    drop((d_gate, d_up));
    let d_m = spec.team.end(d_m);
    let (d_h, ffn_norm) = B::rms_norm_backward(h, weights.ffn_norm.clone(), inv_rms, d_m, Some(grad));

    // Attention.
    let d_rows = spec.begin_gather(B::operand(d_h.clone(), precision));
    let (n, inv_rms) = attention_norm.unwrap_or_else(|| norm::<B>(x.clone(), &weights.attention_norm, spec));
    let n = spec.begin_gather(n);
    let d_rows = spec.team.end(d_rows);
    let [wo] = gradients::<B, 1>([(wanted.wo, &d_rows)], attention.rows(), precision);
    let d_out = input(&[(&d_rows, &weights.wo)], attention.out.dtype());
    drop(d_rows);
    let d_out = B::float_reshape(d_out, attention.out.shape());
    let [d_q, d_k, d_v] = B::causal_attention_backward(attention, d_out);
    let turn_back = |d| rows::<B>(B::rotary(d, spec.cos.clone(), spec.sin.clone(), true));
    let (d_q, d_k, d_v) = (turn_back(d_q), turn_back(d_k), rows::<B>(d_v));
    let n = spec.team.end(n);
    let d_n = input(&[(&d_q, &weights.wq), (&d_k, &weights.wk), (&d_v, &weights.wv)], x.dtype());
    let d_n = spec.team.begin_scatter_sum::<B>(d_n);
    let [wq, wk, wv] = gradients::<B, 3>([(wanted.wq, &d_q), (wanted.wk, &d_k), (wanted.wv, &d_v)], n, precision);
    drop((d_q, d_k, d_v));
    let d_n = spec.team.end(d_n);
    let (d_x, attention_norm) = B::rms_norm_backward(x, weights.attention_norm.clone(), inv_rms, d_n, Some(d_h));

    let norms = [wanted.attention_norm.then_some(attention_norm), wanted.ffn_norm.then_some(ffn_norm)];
    let [attention_norm, ffn_norm] = norms;
    (d_x, BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 })
}
