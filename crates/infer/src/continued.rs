//! A text that was read under one context policy goes on under another: to compare policies at a depth without
//! reading up to it under each.

use crate::context::ContextConfig;
use crate::engine::{Engine, EngineError, EngineOptions, Sequence};

impl Engine {
    /// A copy of `sequence` that goes on under `context`, which begins with what is there and knows nothing of how
    /// it was read. Refuses policies that keep other forms of keys than the sequence holds, and sequences whose
    /// policy has dropped or moved tokens.
    pub fn continued(
        &self,
        sequence: &Sequence,
        context: &ContextConfig,
    ) -> Result<Sequence, EngineError> {
        let options = EngineOptions {
            context: context.clone(),
            ..sequence.options().clone()
        };
        let fresh = self.sequence(&options, None)?;
        let (old, new) = (sequence.spec(), fresh.spec());
        let keeps_all = matches!(
            sequence.options().context,
            ContextConfig::Full | ContextConfig::Hip(_)
        );
        if !keeps_all
            || (old.raw_keys, old.first_page, old.positions)
                != (new.raw_keys, new.first_page, new.positions)
        {
            return Err(EngineError::Refused(format!(
                "a text read under {} cannot go on under {context}; expected one read under full or hip, and a policy that needs no other keys",
                sequence.options().context
            )));
        }
        let mut next = sequence.fork();
        next.policy = fresh.policy;
        next.options = options;
        Ok(next)
    }
}
