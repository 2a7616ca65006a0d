//! The machine that runs a pickle: the instructions that `torch.save` uses, in protocols 2 to 5, and no others.
//!
//! Every instruction makes at most one value, and values refer to each other by number. So nothing is copied, nothing is deep, and
//! memory is bounded by the length of the pickle.

use super::{
    Fault,
    globals::Global,
    value::{Id, Value, Values},
    view::Window,
};

/// Runs a pickle. Returns its values and the number of the one that it leaves.
///
/// # Errors
/// When it is damaged, or asks for anything but a structure of tensors.
pub fn run(pickle: &[u8]) -> Result<(Values<'_>, Id), Fault> {
    let mut machine = Machine {
        pickle,
        at: 0,
        instruction: 0,
        values: Values::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
    };
    loop {
        machine.instruction = machine.at;
        if let Some(root) = machine.step()? {
            return Ok((machine.values, root));
        }
    }
}

struct Machine<'p> {
    pickle: &'p [u8],
    at: usize,
    /// Where the current instruction begins.
    instruction: usize,
    values: Values<'p>,
    stack: Vec<Id>,
    /// Heights of the stack at which groups of values begin.
    marks: Vec<usize>,
    memo: Vec<Id>,
}

impl<'p> Machine<'p> {
    /// One instruction; the last gives the result.
    fn step(&mut self) -> Result<Option<Id>, Fault> {
        let code = self.take(1)?[0];
        match code {
            b'.' => return self.stop().map(Some),
            0x80 => self.protocol()?,
            // A frame says only how much to read at once.
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b't' | 0x85..=0x87 => {
                let items = match code {
                    b't' => self.pop_group()?,
                    _ => self.pop_many(usize::from(code - 0x84))?,
                };
                self.push(Value::Tuple(items));
            }
            b'l' => {
                let items = self.pop_group()?;
                self.push(Value::List(items));
            }
            b'd' => {
                let pairs = self.pop_group().and_then(pairs)?;
                self.push(Value::Dict(pairs));
            }
            b'a' | b'e' => self.append(code)?,
            b's' | b'u' => self.set_items(code)?,
            b'q' | b'r' | 0x94 => self.memorize(code)?,
            b'h' | b'j' => self.recall(code)?,
            b'c' | 0x93 => self.global(code)?,
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'b' => self.build()?,
            _ => {
                let value = self.literal(code)?;
                self.push(value);
            }
        }
        Ok(None)
    }

    /// The value that an instruction spells out.
    fn literal(&mut self, code: u8) -> Result<Value<'p>, Fault> {
        Ok(match code {
            b'N' | 0x88 | 0x89 => Value::Opaque,
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'K' => Value::Int(i64::from(self.take(1)?[0])),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.array()?))),
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                Value::Opaque
            }
            b'X' | 0x8c | 0x8d | b'T' | b'U' => {
                let length = self.length(code)?;
                let text = std::str::from_utf8(self.take(length)?);
                Value::Text(text.map_err(|_| self.refuse("a text that is not UTF-8"))?)
            }
            b'B' | b'C' | 0x8e | 0x96 => {
                let length = self.length(code)?;
                self.take(length)?;
                Value::Opaque
            }
            b')' => Value::Tuple(Vec::new()),
            b']' => Value::List(Vec::new()),
            b'}' => Value::Dict(Vec::new()),
            _ => return Err(self.refuse(unknown(code))),
        })
    }

    /// Bytes of a text, or of plain bytes, which each instruction counts in its own way.
    fn length(&mut self, code: u8) -> Result<usize, Fault> {
        let length = match code {
            0x8c | b'U' | b'C' => u64::from(self.take(1)?[0]),
            0x8d | 0x8e | 0x96 => u64::from_le_bytes(self.array()?),
            _ => u64::from(u32::from_le_bytes(self.array()?)),
        };
        usize::try_from(length).map_err(|_| ends_early())
    }

    /// A number of any length; beyond 64 bits it is none that is needed here.
    fn long(&mut self) -> Result<Value<'p>, Fault> {
        let length = usize::from(self.take(1)?[0]);
        let digits = self.take(length)?;
        let negative = digits.last().is_some_and(|&last| last & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        match wide.get_mut(..length) {
            Some(low) => low.copy_from_slice(digits),
            None => return Ok(Value::Opaque),
        }
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    fn protocol(&mut self) -> Result<(), Fault> {
        match self.take(1)?[0] {
            2..=5 => Ok(()),
            other => Err(self.refuse(format!("protocol {other}"))),
        }
    }

    fn stop(&mut self) -> Result<Id, Fault> {
        let root = self.pop()?;
        let rest = self.pickle.len() - self.at;
        match self.stack.is_empty() && self.marks.is_empty() && rest == 0 {
            true => Ok(root),
            false => Err(damaged("its pickle leaves something over at its end")),
        }
    }

    fn append(&mut self, code: u8) -> Result<(), Fault> {
        let items = match code {
            b'a' => self.pop_many(1)?,
            _ => self.pop_group()?,
        };
        let top = self.top()?;
        match self.values.get_mut(top) {
            Value::List(list) => list.extend(items),
            other => {
                let kind = other.kind();
                return Err(self.refuse(format!("{kind} that is used as a list")));
            }
        }
        Ok(())
    }

    fn set_items(&mut self, code: u8) -> Result<(), Fault> {
        let items = match code {
            b's' => self.pop_many(2)?,
            _ => self.pop_group()?,
        };
        let new = pairs(items)?;
        let top = self.top()?;
        match self.values.get_mut(top) {
            Value::Dict(pairs) => pairs.extend(new),
            other => {
                let kind = other.kind();
                return Err(self.refuse(format!("{kind} that is used as a dictionary")));
            }
        }
        Ok(())
    }

    /// Remembers the topmost value. Writers number what they remember one by one.
    fn memorize(&mut self, code: u8) -> Result<(), Fault> {
        let index = match code {
            b'q' => usize::from(self.take(1)?[0]),
            b'r' => u32::from_le_bytes(self.array()?) as usize,
            _ => self.memo.len(),
        };
        let top = self.top()?;
        if index == self.memo.len() {
            self.memo.push(top);
            return Ok(());
        }
        let known = self.memo.len();
        match self.memo.get_mut(index) {
            Some(place) => *place = top,
            None => {
                return Err(self.refuse(format!("memory place {index}, where {known} are in use")));
            }
        }
        Ok(())
    }

    fn recall(&mut self, code: u8) -> Result<(), Fault> {
        let index = match code {
            b'h' => usize::from(self.take(1)?[0]),
            _ => u32::from_le_bytes(self.array()?) as usize,
        };
        let known = self.memo.get(index).copied();
        let id = known.ok_or_else(|| damaged("its pickle recalls what it never had"))?;
        self.stack.push(id);
        Ok(())
    }

    /// Looks a name up, on the list and nowhere else.
    fn global(&mut self, code: u8) -> Result<(), Fault> {
        let (module, name) = match code {
            b'c' => (self.line()?, self.line()?),
            _ => {
                let names = self.pop_many(2)?;
                match (self.values.get(names[0]), self.values.get(names[1])) {
                    (Value::Text(module), Value::Text(name)) => (*module, *name),
                    _ => return Err(self.refuse("a function without a name")),
                }
            }
        };
        match Global::find(module, name) {
            Some(global) => self.push(Value::Global(global)),
            None => {
                let (module, name) = (shown(module), shown(name));
                return Err(self.refuse(format!("`{module}.{name}`, which is not on the list")));
            }
        }
        Ok(())
    }

    /// The only thing that lies outside of a pickle: a storage, named by a record of the archive.
    fn storage(&mut self) -> Result<(), Fault> {
        let id = self.pop()?;
        let storage = self.values.storage(id);
        let storage = storage.ok_or_else(|| self.refuse("something outside that is no storage"))?;
        self.push(Value::Storage(storage));
        Ok(())
    }

    /// A call: of the functions on the list, done here, and of nothing else.
    fn call(&mut self) -> Result<(), Fault> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Tuple(arguments) = self.values.get(arguments) else {
            return Err(self.refuse("a call without a tuple of arguments"));
        };
        let made = match self.values.get(function) {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => Value::Dict(Vec::new()),
            Value::Global(Global::Plain) => Value::Opaque,
            Value::Global(Global::Tensor) => self.tensor(arguments)?,
            Value::Global(Global::Size) => match arguments.as_slice() {
                &[sizes] if matches!(self.values.get(sizes), Value::Tuple(_)) => {
                    self.stack.push(sizes);
                    return Ok(());
                }
                _ => return Err(self.refuse("a size that is no tuple")),
            },
            Value::Global(Global::Parameter) => match arguments.as_slice() {
                &[data, _, _] if matches!(self.values.get(data), Value::Tensor(..)) => {
                    self.stack.push(data);
                    return Ok(());
                }
                _ => return Err(self.refuse("a parameter that is no tensor")),
            },
            other => {
                let kind = other.kind();
                return Err(self.refuse(format!("a call of {kind}")));
            }
        };
        self.push(made);
        Ok(())
    }

    fn tensor(&self, arguments: &[Id]) -> Result<Value<'p>, Fault> {
        let Some((storage, first, shape, strides)) = self.values.view(arguments) else {
            return Err(self.refuse("a tensor whose storage, shape or strides are none"));
        };
        let window = Window::new(first, shape, strides, storage.elements);
        let window = window.map_err(|what| self.refuse(what))?;
        Ok(Value::Tensor(storage, window))
    }

    /// Attributes: of a dictionary (the versions of modules) or of a plain value, where they do not matter.
    fn build(&mut self) -> Result<(), Fault> {
        self.pop()?;
        match self.values.get(self.top()?) {
            Value::Dict(_) | Value::Opaque => Ok(()),
            other => Err(self.refuse(format!("attributes of {}", other.kind()))),
        }
    }

    fn push(&mut self, value: Value<'p>) {
        self.stack.push(self.values.add(value));
    }

    /// The topmost value of the current group.
    fn top(&self) -> Result<Id, Fault> {
        let group = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.get(group..).and_then(|group| group.last());
        top.copied()
            .ok_or_else(|| damaged("its pickle takes more values than it has made"))
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, Fault> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        Ok(items)
    }

    fn pop_group(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop();
        let from = mark.ok_or_else(|| damaged("its pickle ends a group that it never began"))?;
        Ok(self.stack.split_off(from))
    }

    fn take(&mut self, count: usize) -> Result<&'p [u8], Fault> {
        let rest = &self.pickle[self.at..];
        let taken = rest.get(..count).ok_or_else(ends_early)?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let taken = self.take(N)?;
        Ok(taken.try_into().expect("invariant: as many were taken"))
    }

    fn line(&mut self) -> Result<&'p str, Fault> {
        let rest = &self.pickle[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or_else(ends_early)?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| self.refuse("a name that is not UTF-8"))
    }

    fn refuse(&self, what: impl Into<String>) -> Fault {
        Fault::Refused {
            at: self.instruction,
            what: what.into(),
        }
    }
}

fn pairs(items: Vec<Id>) -> Result<Vec<(Id, Id)>, Fault> {
    match items.as_chunks() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err(damaged(
            "a dictionary of its pickle has a key without a value",
        )),
    }
}

/// An instruction that is not run, by name where the name says why.
fn unknown(code: u8) -> String {
    let name = match code {
        b'i' | b'o' | 0x81 | 0x92 => "the making of an object of any class",
        0x82..=0x84 => "a name from a registry",
        b'P' => "something outside that is named by a text",
        0x97 | 0x98 => "a buffer outside of the file",
        b'p' | b'g' | b'I' | b'L' | b'F' | b'S' | b'V' => "protocol 0",
        _ => return format!("instruction 0x{code:02x}, which torch.save never writes"),
    };
    format!("{name} (instruction 0x{code:02x})")
}

/// A name from a file that nobody vouches for: short, and without control characters.
pub(super) fn shown(name: &str) -> String {
    name.chars()
        .take(80)
        .flat_map(char::escape_default)
        .collect()
}

fn ends_early() -> Fault {
    damaged("its pickle ends early")
}

fn damaged(problem: &str) -> Fault {
    Fault::Damaged(problem.to_owned())
}
