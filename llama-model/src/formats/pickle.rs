//! The part of Python's pickle that a PyTorch checkpoint of tensors needs, and no more: data is built, code is never run.
//! Any callable but the three that rebuild tensors is refused.

use std::collections::BTreeMap;
use std::rc::Rc;

/// How deep values may be nested, and how many there may be: far more than any checkpoint has.
const MAX_STACK: usize = 1 << 20;

/// Dimensions of a tensor, at most.
const MAX_DIMS: usize = 8;

/// A pickled value. Whatever can be referred to again is cheap to copy, so that a small file cannot fill the memory.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Rc<str>),
    Tuple(Vec<Object>),
    List(Vec<Object>),
    Dict(Vec<(Object, Object)>),
    Global(Rc<str>),
    /// The type, name and number of elements of a storage in the archive.
    Storage {
        kind: Rc<str>,
        key: Rc<str>,
    },
    Tensor(Tensor),
    Mark,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    /// Python's name of the element type: `FloatStorage`, `BFloat16Storage`, ...
    pub kind: Rc<str>,
    /// File in the archive's `data` folder.
    pub key: Rc<str>,
    /// First element.
    pub offset: usize,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
}

const ALLOWED: [&str; 3] =
    ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"];

/// The tensors of a pickled dictionary by name.
pub(super) fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let Object::Dict(entries) = load(bytes)? else {
        return Err("the file does not hold a dictionary of tensors".into());
    };
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        match (name, value) {
            (Object::Text(name), Object::Tensor(tensor)) => {
                tensors.insert(name.to_string(), tensor);
            }
            (name, value) => return Err(format!("{name:?} is not the name of a tensor, but of {value:?}")),
        }
    }
    Ok(tensors)
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Object>,
    /// Values by number; none where nothing refers to the value in a checkpoint: containers with something in them.
    memo: BTreeMap<u32, Option<Object>>,
}

fn load(bytes: &[u8]) -> Result<Object, String> {
    let mut machine = Machine { bytes, at: 0, stack: Vec::new(), memo: BTreeMap::new() };
    loop {
        if let Some(result) = machine.step()? {
            return Ok(result);
        }
        if machine.stack.len() > MAX_STACK || machine.memo.len() > MAX_STACK {
            return Err("too many values".into());
        }
    }
}

impl Machine<'_> {
    fn take(&mut self, len: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len()).ok_or("the pickle ends too early")?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or("the pickle ends too early")?;
        let line = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(line)
    }

    fn text(&mut self, len: usize) -> Result<Object, String> {
        let text = std::str::from_utf8(self.take(len)?);
        text.map(|text| Object::Text(text.into())).map_err(|_| "text that is not UTF-8".into())
    }

    fn pop(&mut self) -> Result<Object, String> {
        self.stack.pop().ok_or_else(|| "the pickle takes more than it gave".into())
    }

    fn top(&mut self) -> Result<&mut Object, String> {
        self.stack.last_mut().ok_or_else(|| "the pickle takes more than it gave".into())
    }

    /// What was pushed since the last mark.
    fn since_mark(&mut self) -> Result<Vec<Object>, String> {
        let at = self.stack.iter().rposition(|object| *object == Object::Mark).ok_or("a mark is missing")?;
        let objects = self.stack.split_off(at + 1);
        self.stack.pop();
        Ok(objects)
    }

    fn set(&mut self, pairs: Vec<Object>) -> Result<(), String> {
        let Object::Dict(entries) = self.top()? else { return Err("items are set on what is no dictionary".into()) };
        let mut pairs = pairs.into_iter();
        while let (Some(name), Some(value)) = (pairs.next(), pairs.next()) {
            entries.push((name, value));
        }
        Ok(())
    }

    fn memoize(&mut self, index: u32) -> Result<(), String> {
        let object = match self.top()? {
            Object::Tuple(parts) | Object::List(parts) if !parts.is_empty() => None,
            Object::Dict(entries) if !entries.is_empty() => None,
            object => Some(object.clone()),
        };
        self.memo.insert(index, object);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let object = self.memo.get(&index).cloned().flatten().ok_or("a reference to what no tensor shares")?;
        self.stack.push(object);
        Ok(())
    }

    fn step(&mut self) -> Result<Option<Object>, String> {
        match self.byte()? {
            0x80 => {
                let protocol = self.byte()?;
                if protocol > 5 {
                    return Err(format!("pickle protocol {protocol}; up to 5 is read"));
                }
            }
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.stack.push(Object::Mark),
            b'N' => self.stack.push(Object::None),
            0x88 => self.stack.push(Object::Bool(true)),
            0x89 => self.stack.push(Object::Bool(false)),
            b'K' => {
                let value = self.byte()?;
                self.stack.push(Object::Int(value.into()));
            }
            b'M' => {
                let bytes = self.take(2)?;
                let value = u16::from_le_bytes([bytes[0], bytes[1]]);
                self.stack.push(Object::Int(value.into()));
            }
            b'J' => {
                let value = self.u32()? as i32;
                self.stack.push(Object::Int(value.into()));
            }
            0x8a => {
                let len = usize::from(self.byte()?);
                let bytes = self.take(len)?;
                if len > 8 {
                    return Err("an integer of more than 64 bits".into());
                }
                // The last byte's sign goes on.
                let fill = if bytes.last().is_some_and(|b| *b >= 0x80) { 0xff } else { 0 };
                let mut value = [fill; 8];
                value[..len].copy_from_slice(bytes);
                self.stack.push(Object::Int(i64::from_le_bytes(value)));
            }
            b'G' => {
                let mut value = [0; 8];
                value.copy_from_slice(self.take(8)?);
                self.stack.push(Object::Float(f64::from_be_bytes(value)));
            }
            b'X' => {
                let len = self.u32()? as usize;
                let text = self.text(len)?;
                self.stack.push(text);
            }
            0x8c => {
                let len = usize::from(self.byte()?);
                let text = self.text(len)?;
                self.stack.push(text);
            }
            b')' => self.stack.push(Object::Tuple(Vec::new())),
            b']' => self.stack.push(Object::List(Vec::new())),
            b'}' => self.stack.push(Object::Dict(Vec::new())),
            b't' => {
                let objects = self.since_mark()?;
                self.stack.push(Object::Tuple(objects));
            }
            code @ 0x85..=0x87 => {
                let len = usize::from(code - 0x84);
                let at = self.stack.len().checked_sub(len).ok_or("the pickle takes more than it gave")?;
                let objects = self.stack.split_off(at);
                self.stack.push(Object::Tuple(objects));
            }
            b'e' => {
                let objects = self.since_mark()?;
                let Object::List(list) = self.top()? else { return Err("items are added to what is no list".into()) };
                list.extend(objects);
            }
            b'a' => {
                let object = self.pop()?;
                let Object::List(list) = self.top()? else { return Err("an item is added to what is no list".into()) };
                list.push(object);
            }
            b'u' => {
                let pairs = self.since_mark()?;
                self.set(pairs)?;
            }
            b's' => {
                let (value, name) = (self.pop()?, self.pop()?);
                self.set(vec![name, value])?;
            }
            b'q' => {
                let index = self.byte()?.into();
                self.memoize(index)?;
            }
            b'r' => {
                let index = self.u32()?;
                self.memoize(index)?;
            }
            0x94 => {
                let index = self.memo.len() as u32;
                self.memoize(index)?;
            }
            b'h' => {
                let index = self.byte()?.into();
                self.recall(index)?;
            }
            b'j' => {
                let index = self.u32()?;
                self.recall(index)?;
            }
            b'c' => {
                let name = format!("{} {}", self.line()?, self.line()?);
                self.global(name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Object::Text(module), Object::Text(name)) = (module, name) else {
                    return Err("a callable without a name".into());
                };
                self.global(format!("{module} {name}"))?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.stack.push(storage(id)?);
            }
            b'R' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.stack.push(call(callable, arguments)?);
            }
            // Attributes of a dictionary (`_metadata`), which hold nothing of a tensor.
            b'b' => drop(self.pop()?),
            other => return Err(format!("pickle instruction 0x{other:02x} is not one that tensors need")),
        }
        Ok(None)
    }

    fn global(&mut self, name: String) -> Result<(), String> {
        let is_storage = name.strip_prefix("torch ").is_some_and(|kind| kind.ends_with("Storage"));
        if !is_storage && !ALLOWED.contains(&name.as_str()) {
            let name = name.replace(' ', ".");
            return Err(format!("the file wants to call `{name}`: refused, only tensors are read"));
        }
        self.stack.push(Object::Global(name.into()));
        Ok(())
    }
}

/// `("storage", torch.FloatStorage, key, location, elements)`
fn storage(id: Object) -> Result<Object, String> {
    if let Object::Tuple(parts) = id
        && let [Object::Text(what), Object::Global(kind), Object::Text(key), ..] = &parts[..]
        && **what == *"storage"
    {
        let kind = kind.trim_start_matches("torch ").into();
        return Ok(Object::Storage { kind, key: key.clone() });
    }
    Err("a reference outside the file that is no storage".into())
}

fn call(callable: Object, arguments: Object) -> Result<Object, String> {
    let (Object::Global(name), Object::Tuple(arguments)) = (callable, arguments) else {
        return Err("a call of what cannot be called".into());
    };
    match (name.split(' ').next_back(), &arguments[..]) {
        (Some("OrderedDict"), []) => Ok(Object::Dict(Vec::new())),
        (Some("_rebuild_parameter"), [tensor @ Object::Tensor(_), ..]) => Ok(tensor.clone()),
        (
            Some("_rebuild_tensor_v2"),
            [Object::Storage { kind, key }, Object::Int(offset), Object::Tuple(dims), Object::Tuple(strides), ..],
        ) => {
            let sizes = |values: &[Object]| {
                let size = |value: &Object| if let Object::Int(n) = value { usize::try_from(*n).ok() } else { None };
                values.iter().map(size).collect::<Option<Vec<_>>>().ok_or("a tensor with a size that is none")
            };
            let offset = usize::try_from(*offset).map_err(|_| "a tensor that begins before its storage")?;
            let (dims, strides) = (sizes(dims)?, sizes(strides)?);
            if dims.len() != strides.len() || dims.len() > MAX_DIMS {
                return Err("a tensor with other strides than dimensions, or too many".into());
            }
            Ok(Object::Tensor(Tensor { kind: kind.clone(), key: key.clone(), offset, dims, strides }))
        }
        (name, _) => Err(format!("{name:?} is called with arguments that no tensor has")),
    }
}

/// A dictionary of contiguous tensors as PyTorch pickles it: name, storage kind and shape; the storages are numbered.
pub(super) fn dump(tensors: &[(String, &str, Vec<usize>)]) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}', b'('];
    let text = |out: &mut Vec<u8>, text: &str| {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let int = |out: &mut Vec<u8>, value: usize| {
        out.extend([0x8a, 8]);
        out.extend((value as u64).to_le_bytes());
    };
    for (index, (name, kind, dims)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{kind}\n").as_bytes());
        text(&mut out, &index.to_string());
        text(&mut out, "cpu");
        int(&mut out, dims.iter().product());
        out.extend(b"tQ");
        int(&mut out, 0);
        out.push(b'(');
        dims.iter().for_each(|dim| int(&mut out, *dim));
        out.extend(b"t(");
        (0..dims.len()).for_each(|i| int(&mut out, dims[i + 1..].iter().product()));
        // Without gradients, and without hooks.
        out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dumped_is_loaded() {
        let stored = [("a.weight".to_string(), "FloatStorage", vec![3, 4]), ("b".to_string(), "HalfStorage", vec![7])];
        let tensors = tensors(&dump(&stored)).unwrap();
        let a = &tensors["a.weight"];
        assert_eq!((&*a.kind, &*a.key, a.offset), ("FloatStorage", "0", 0));
        assert_eq!((&a.dims[..], &a.strides[..]), (&[3, 4][..], &[4, 1][..]));
        assert_eq!(tensors["b"].dims, [7]);
    }

    #[test]
    fn code_is_refused() {
        // `os.system("true")` as `pickle.dumps` writes it.
        let evil = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
        let error = tensors(evil).unwrap_err();
        assert!(error.contains("posix.system") && error.contains("refused"), "{error}");
        for name in ["builtins\neval", "torch\nload", "torch.serialization\nStorage", "__builtin__\nexec"] {
            let evil = format!("c{name}\n.");
            assert!(tensors(evil.as_bytes()).unwrap_err().contains("refused"), "{name}");
        }
    }

    #[test]
    fn nonsense_is_an_error() {
        let good = dump(&[("a".to_string(), "FloatStorage", vec![2])]);
        for len in 0..good.len() {
            assert!(tensors(&good[..len]).is_err(), "{len}");
        }
        for bytes in [&b"."[..], b"(.", b"e.", b"R.", b"}u.", b"h\x05.", b"\x87.", b"\x80\x09.", b"K\x01."] {
            assert!(tensors(bytes).is_err(), "{bytes:?}");
        }
        // Every byte changed: an error or a dictionary, never a panic.
        for at in 0..good.len() {
            for value in [0, 0x28, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = tensors(&bad);
            }
        }
    }
}
