//! Several documents packed into one row.

use tch::{Device, Tensor};

/// Where documents begin inside rows, in the form that the model needs. Neither attention, state nor decay crosses the
/// start of a document, and rotary positions begin again at 0 there.
#[derive(Debug)]
pub struct Documents {
    /// Position of each token inside its document, or inside the row before the first start: i64 [B, T].
    pub positions_bt: Tensor,
    /// Number of starts up to and including each token: i64 [B, T]. Tokens of segment 0 go on with whatever ran before
    /// the row; a row that starts with a document begins with segment 1.
    pub segments_bt: Tensor,
}

impl Documents {
    /// From the ascending positions at which documents begin, one list per row, for rows of `tokens` tokens. Starts
    /// behind the end of the row are ignored.
    pub fn from_starts(rows: &[impl AsRef<[u32]>], tokens: usize) -> Documents {
        let mut positions = Vec::with_capacity(rows.len() * tokens);
        let mut segments = Vec::with_capacity(rows.len() * tokens);
        for starts in rows {
            let starts = starts.as_ref().iter();
            let mut upcoming = starts.map(|&start| start as usize).peekable();
            let (mut segment, mut begin) = (0i64, 0);
            for token in 0..tokens {
                while let Some(start) = upcoming.next_if(|&start| start <= token) {
                    segment += 1;
                    begin = start;
                }
                positions.push((token - begin) as i64);
                segments.push(segment);
            }
        }
        let shape = [rows.len() as i64, tokens as i64];
        Documents {
            positions_bt: Tensor::from_slice(&positions).view(shape),
            segments_bt: Tensor::from_slice(&segments).view(shape),
        }
    }

    /// The same on another device.
    pub fn to_device(&self, device: Device) -> Documents {
        Documents {
            positions_bt: self.positions_bt.to_device(device),
            segments_bt: self.segments_bt.to_device(device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tensor: &Tensor) -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(tensor).unwrap()
    }

    #[test]
    fn positions_restart_and_segments_count_starts() {
        let documents = Documents::from_starts(&[vec![0, 3], vec![2, 3, 5], vec![]], 5);
        assert_eq!(
            rows(&documents.positions_bt),
            [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
        );
        assert_eq!(
            rows(&documents.segments_bt),
            [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
        );
    }
}
