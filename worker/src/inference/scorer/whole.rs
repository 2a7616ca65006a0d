//! Requests as whole sequences through the parallel form, padded to the length of the longest.

use tch::Tensor;

use super::{
    ScoreError, Scored, Scorer,
    sharing::{Group, Request},
};
use crate::{
    inference::{load::LoadedModel, score::scores},
    model::Form,
};

/// Tokens that go through the parallel form at once, padding included.
const PARALLEL_TOKENS: usize = 8192;

impl Scorer {
    /// Each request is a row; the shorter ones are filled up at the end, where nothing that counts sees it.
    pub(super) fn requests_whole(
        &mut self,
        requests: &[Request],
        groups: &[Group],
        found: &mut [Option<Scored>],
        progress: &mut impl FnMut(usize, usize),
    ) -> Result<(), ScoreError> {
        let model = self.engine.model();
        let mut order: Vec<usize> = groups
            .iter()
            .flat_map(|group| &group.members)
            .copied()
            .collect();
        order.sort_by_key(|&request| std::cmp::Reverse(requests[request].tokens()));
        let (mut rest, mut done) = (order.as_slice(), 0);
        while let Some(&longest) = rest.first() {
            let rows = (PARALLEL_TOKENS / requests[longest].tokens()).clamp(1, self.engine.slots());
            let (now, later) = rest.split_at(rows.min(rest.len()));
            let batch: Vec<&Request> = now.iter().map(|&request| &requests[request]).collect();
            for (&request, scored) in now.iter().zip(whole(model, &batch)?) {
                found[request] = Some(scored);
            }
            done += now.len();
            progress(done, requests.len());
            rest = later;
        }
        Ok(())
    }
}

/// Whole requests in one batch through the parallel form.
fn whole(model: &LoadedModel, batch: &[&Request]) -> Result<Vec<Scored>, ScoreError> {
    let longest = batch.iter().map(|request| request.tokens() - 1).max();
    let longest = longest.unwrap_or(0);
    model
        .transformer
        .config()
        .check_sequence_length(longest as i64)?;
    let (mut ids, mut places, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (row, request) in batch.iter().enumerate() {
        let all = request.context.iter().chain(&request.continuation);
        let inputs = all.map(|&token| i64::from(token));
        ids.extend(inputs.take(request.tokens() - 1));
        ids.resize((row + 1) * longest, 0);
        let first = row * longest + request.context.len() - 1;
        let last = first + request.continuation.len();
        places.extend((first..last).map(|place| place as i64));
        wanted.extend_from_slice(&request.continuation);
    }
    let device = model.params.device();
    let ids_bt = Tensor::from_slice(&ids)
        .view([batch.len() as i64, longest as i64])
        .to_device(device);
    let places_n = Tensor::from_slice(&places).to_device(device);
    let found = tch::no_grad(|| {
        let transformer = model.transformer.clone().with_form(Form::Parallel);
        let logits_btv = transformer.logits(&model.params, &ids_bt, None);
        let logits_nv = logits_btv.flatten(0, 1).index_select(0, &places_n);
        scores(&logits_nv, &wanted, 0)
    });
    let found = found.ok_or(ScoreError::NotNumbers)?;
    let mut rest = found.as_slice();
    let scored = batch.iter().map(|request| {
        let (mine, others) = rest.split_at(request.continuation.len());
        rest = others;
        Scored::of(mine)
    });
    Ok(scored.collect())
}
