//! What the machine builds: values that refer to each other by number.

use super::{
    globals::Global,
    view::{Storage, Window},
};

/// The number of a value.
pub type Id = usize;

/// What a pickle builds.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'p> {
    /// Something that weights do not need: a float, bytes, a truth value, nothing.
    Opaque,
    /// A whole number.
    Int(i64),
    /// Text.
    Text(&'p str),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list.
    List(Vec<Id>),
    /// A dictionary, ordered.
    Dict(Vec<(Id, Id)>),
    /// A name of the list.
    Global(Global),
    /// A storage.
    Storage(Storage<'p>),
    /// A tensor: its storage, and the window on it.
    Tensor(Storage<'p>, Window),
}

impl Value<'_> {
    /// What it is called in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Opaque => "a plain value",
            Value::Int(_) => "a number",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Dict(_) => "a dictionary",
            Value::Global(_) => "a function or class",
            Value::Storage(_) => "a storage",
            Value::Tensor(..) => "a tensor",
        }
    }
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub struct Values<'p>(Vec<Value<'p>>);

impl<'p> Values<'p> {
    /// The value of a number that an instruction has given.
    pub fn get(&self, id: Id) -> &Value<'p> {
        &self.0[id]
    }

    pub(super) fn get_mut(&mut self, id: Id) -> &mut Value<'p> {
        &mut self.0[id]
    }

    /// Keeps a value, and numbers it.
    pub(super) fn add(&mut self, value: Value<'p>) -> Id {
        self.0.push(value);
        self.0.len() - 1
    }

    /// How many there are: at most one for each byte of the pickle.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The whole numbers of a tuple, if that is what it is.
    pub(super) fn numbers(&self, id: Id) -> Option<Vec<u64>> {
        match self.get(id) {
            // The bound keeps a long tuple from being copied at every use.
            Value::Tuple(items) if items.len() <= 2 * Window::MOST_AXES => {
                items.iter().map(|&item| self.number(item)).collect()
            }
            _ => None,
        }
    }

    pub(super) fn number(&self, id: Id) -> Option<u64> {
        match self.get(id) {
            Value::Int(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// The storage that a tuple names: its class, record, device and number of elements.
    pub(super) fn storage(&self, id: Id) -> Option<Storage<'p>> {
        let Value::Tuple(items) = self.get(id) else {
            return None;
        };
        let &[tag, class, key, _, elements] = items.as_slice() else {
            return None;
        };
        match (self.get(tag), self.get(class), self.get(key)) {
            (Value::Text("storage"), Value::Global(Global::Storage(dtype)), Value::Text(key)) => {
                Some(Storage {
                    key,
                    dtype: *dtype,
                    elements: self.number(elements)?,
                })
            }
            _ => None,
        }
    }

    /// Storage, first element, shape and strides; what follows them is for training.
    pub(super) fn view(&self, arguments: &[Id]) -> Option<(Storage<'p>, u64, Vec<u64>, Vec<u64>)> {
        let &[storage, first, shape, strides, ref rest @ ..] = arguments else {
            return None;
        };
        match self.get(storage) {
            Value::Storage(storage) if matches!(rest.len(), 2..=3) => Some((
                *storage,
                self.number(first)?,
                self.numbers(shape)?,
                self.numbers(strides)?,
            )),
            _ => None,
        }
    }
}
