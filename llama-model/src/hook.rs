//! What happens to parameters while a loss is computed: a value may still be on its way when the forward comes to it, and a gradient may go on its way
//! as soon as the backward has made it. Devices that train together hide so what they exchange (paper, section 2.4).

use std::borrow::Cow;
use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Weak};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;

use crate::LlamaBackend;
use crate::backend::ops::{primitive, tensor};
use crate::weights::PathStack;

/// Is asked for every trained parameter when the forward comes to it, in the module's order, and given its gradient when the backward has made it.
pub trait ParamHook<B: Backend>: Send + Sync {
    /// The value that the forward uses for the one that the model has.
    fn before_forward(&self, path: &str, value: FloatTensor<B>) -> FloatTensor<B>;

    /// Takes the gradient, which the result of the backward then lacks. It tracks no gradients itself.
    fn after_backward(&self, path: &str, gradient: FloatTensor<B>);
}

/// The hook of a model, if it has one.
pub(crate) type Hook<'a, B> = Option<&'a Arc<dyn ParamHook<B>>>;

/// Who takes the gradient of one parameter.
#[derive(Clone)]
pub struct GradientTaker<B: Backend> {
    /// A graph that no backward has gone through may stay; it does not keep the hook.
    hook: Weak<dyn ParamHook<B>>,
    path: String,
}

impl<B: Backend> GradientTaker<B> {
    pub(crate) fn take(&self, gradient: FloatTensor<B>) {
        if let Some(hook) = self.hook.upgrade() {
            hook.after_backward(&self.path, gradient);
        }
    }
}

impl<B: Backend> Debug for GradientTaker<B> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// The part of a model at `path` as the hook wants it used, for `x`.
pub(crate) fn hooked<'a, B: LlamaBackend, M: Module<B>, const D: usize>(
    hook: Hook<'_, B>,
    path: &str,
    part: &'a M,
    x: Option<&Tensor<B, D>>,
) -> Cow<'a, M> {
    let Some(hook) = hook else { return Cow::Borrowed(part) };
    let path = PathStack::at(path);
    Cow::Owned(part.clone().map(&mut Mapper { path, hook, x: x.cloned().map(primitive) }))
}

struct Mapper<'a, B: Backend> {
    path: PathStack,
    hook: &'a Arc<dyn ParamHook<B>>,
    x: Option<FloatTensor<B>>,
}

impl<B: LlamaBackend> ModuleMapper<B> for Mapper<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, value, mapper) = param.consume();
        if !value.is_require_grad() {
            return Param::from_mapped_value(id, value, mapper);
        }
        let path = self.path.path();
        let value = tensor::<B, D>(self.hook.before_forward(&path, primitive(value))).require_grad();
        let taker = GradientTaker { hook: Arc::downgrade(self.hook), path };
        let value = B::take_gradient(primitive(value), self.x.as_ref(), taker);
        Param::from_mapped_value(id, tensor(value), mapper)
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}
