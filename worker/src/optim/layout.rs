//! Where each parameter lies in the flat buffers.

use tch::Tensor;

use crate::model::{ParamSpec, Params};

/// One parameter's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Published name.
    pub name: String,
    /// Shape of the parameter.
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: i64,
    /// Number of elements.
    pub elements: i64,
}

impl Slot {
    /// The parameter's part of a flat buffer, in its own shape, sharing storage.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.elements)
            .view(self.shape.as_slice())
    }
}

/// The order of all parameters in the flat buffers: first those that weight decay shrinks, then the others, each
/// group in the model's own order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    decayed: i64,
    elements: i64,
}

impl Layout {
    /// Lays parameters out. With `decay_all`, norms and biases decay like matrices.
    pub fn new(params: &[ParamSpec], decay_all: bool) -> Layout {
        let decays = |spec: &&ParamSpec| decay_all || spec.decayed;
        let mut layout = Layout {
            slots: Vec::with_capacity(params.len()),
            decayed: 0,
            elements: 0,
        };
        params
            .iter()
            .filter(decays)
            .for_each(|spec| layout.push(spec));
        layout.decayed = layout.elements;
        params
            .iter()
            .filter(|spec| !decays(spec))
            .for_each(|spec| layout.push(spec));
        layout
    }

    fn push(&mut self, spec: &ParamSpec) {
        let elements = spec.shape.iter().product();
        let slot = Slot {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            offset: self.elements,
            elements,
        };
        self.elements += elements;
        self.slots.push(slot);
    }

    /// All parameters in flat order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The parameters as parts of a flat buffer, by name, sharing its storage.
    pub fn views(&self, flat: &Tensor) -> Params {
        let view = |slot: &Slot| (slot.name.clone(), slot.view(flat));
        Params::new(self.slots.iter().map(view).collect())
    }

    /// Elements of the first segment, which weight decay shrinks.
    pub fn decayed(&self) -> i64 {
        self.decayed
    }

    /// Elements of the whole buffer.
    pub fn elements(&self) -> i64 {
        self.elements
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[i64], decayed: bool) -> ParamSpec {
        ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed,
            new: false,
        }
    }

    #[test]
    fn decayed_parameters_come_first_and_ranges_touch() {
        let params = [
            spec("norm", &[3], false),
            spec("w", &[2, 3], true),
            spec("bias", &[2], false),
        ];
        let layout = Layout::new(&params, false);
        let places: Vec<_> = layout
            .slots()
            .iter()
            .map(|slot| (slot.name.as_str(), slot.offset))
            .collect();
        assert_eq!(places, [("w", 0), ("norm", 6), ("bias", 9)]);
        assert_eq!((layout.decayed(), layout.elements()), (6, 11));
    }

    #[test]
    fn everything_decays_when_asked() {
        let params = [spec("norm", &[3], false), spec("w", &[2, 3], true)];
        let layout = Layout::new(&params, true);
        assert_eq!((layout.decayed(), layout.elements()), (9, 9));
        assert_eq!(layout.slots()[0].name, "norm");
    }
}
