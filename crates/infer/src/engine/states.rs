//! The pass of models that carry a state from token to token instead of caching keys and values.

use super::{Engine, Result, Sequence, Want};
use candle_core::Tensor;
use longspan_nn::mixer::MixerState;
use longspan_nn::model::Recurrent;

impl Engine {
    /// As [`Engine::forward`], for models that carry states: sequences with equally many new tokens move on together.
    pub(super) fn forward_states(
        &self,
        recurrent: &Recurrent,
        rows: &mut [(&mut Sequence, &[u32])],
        want: Want<'_>,
    ) -> Result<Vec<f32>> {
        let model = recurrent.model();
        let together = |a: usize, b: usize| a == b && model.fixed_state();
        let mut wanted = Vec::new();
        let mut done = 0;
        while done < rows.len() {
            let length = rows[done].1.len();
            let alike = rows[done..]
                .iter()
                .take_while(|row| together(row.1.len(), length));
            let group = done..done + alike.count().max(1);
            done = group.end;
            if length == 0 {
                continue;
            }
            let group = &mut rows[group];
            let ids: Vec<&[u32]> = group.iter().map(|(_, tokens)| *tokens).collect();
            let mut states = join(group)?;
            let hidden = model.read(&ids, &mut states)?;
            for (index, (sequence, tokens)) in group.iter_mut().enumerate() {
                sequence.states = Some(match ids.len() {
                    1 => states.clone(),
                    _ => part(&states, index as u32, sequence.tokens.len() + length)?,
                });
                sequence.tokens.extend_from_slice(tokens);
                match want {
                    Want::Nothing => {}
                    Want::Last => wanted.push(hidden.narrow(0, (index + 1) * length - 1, 1)?),
                    Want::All | Want::Losses(_) => {
                        wanted.push(hidden.narrow(0, index * length, length)?)
                    }
                }
            }
        }
        rows.iter_mut()
            .for_each(|(sequence, _)| sequence.broken = false);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = Tensor::cat(&wanted, 0)?;
        match want {
            Want::Losses(targets) => self.losses(&hidden, targets),
            _ => self.logits(&hidden),
        }
    }
}

/// The states of several sequences as those of one batch.
fn join(rows: &[(&mut Sequence, &[u32])]) -> Result<Vec<MixerState>> {
    let states: Vec<&[MixerState]> = rows
        .iter()
        .map(|(sequence, _)| sequence.states.as_deref().unwrap_or_default())
        .collect();
    if let [one] = &states[..] {
        return Ok(one.to_vec());
    }
    let blocks = states.first().map_or(0, |states| states.len());
    (0..blocks)
        .map(|block| {
            let parts: Vec<&MixerState> = states.iter().filter_map(|s| s.get(block)).collect();
            Ok(MixerState::concat(&parts)?)
        })
        .collect()
}

/// The states of one sequence of a batch.
fn part(states: &[MixerState], index: u32, position: usize) -> Result<Vec<MixerState>> {
    let parts = states.iter().map(|state| {
        let mut state = state.select(&[index])?;
        state.position = position;
        Ok(state)
    });
    Ok(parts.collect::<candle_core::Result<_>>()?)
}
