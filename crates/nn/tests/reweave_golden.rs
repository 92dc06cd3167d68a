//! Golden of Contextual Memory Reweaving (44): relevance from attention maps, what is remembered, memory
//! vectors and the stream with them woven in.

#[path = "../../../tests/golden.rs"]
mod golden;

use longspan_nn::memory::reweave::{
    Captured, LowRank, Matrix, Relevance, Reweave, ReweaveConfig, ReweaveMemory,
};

#[test]
fn tokens_are_remembered_and_woven_back() {
    for case in golden::cases_of("memory-reweaving", "llsr") {
        let size = |key: &str| case.meta_usize(key);
        let number = |key: &str| case.meta(key).as_f64().unwrap();
        let (tokens, window, segment) = (size("tokens"), size("window"), size("segment"));
        let (delta, heads, width, rank) =
            (size("delta"), size("heads"), size("width"), size("rank"));
        let layers = case.meta("capture_layers").as_array().unwrap().len();
        let config = ReweaveConfig {
            segment,
            keep: number("keep"),
            min_relevance: number("min_relevance"),
            capacity: size("capacity"),
            decay: number("decay"),
            delta: Some(delta),
            ..ReweaveConfig::default()
        };
        config.check().unwrap();

        // Attention of queries below `end`, as relevance.
        let maps = case.f32("attn_captured"); // [layers, heads, tokens, tokens]
        let relevance = |end: usize| {
            let mut relevance = Relevance::default();
            for query in 0..end {
                let seen = (query + 1).min(window) as f64;
                for token in (query + 1).saturating_sub(window)..=query.saturating_sub(delta) {
                    if query < delta {
                        continue;
                    }
                    let sum: f64 = (0..layers * heads)
                        .map(|map| f64::from(maps[(map * tokens + query) * tokens + token]))
                        .sum();
                    relevance.add(token as u64, seen * sum / (layers * heads) as f64, 1.0);
                }
            }
            relevance
        };
        let all = relevance(tokens);
        let found: Vec<f32> = (0..tokens as u64).map(|token| all.of(token)).collect();
        case.assert_close("relevance_all", &found);

        // Chunk by chunk; memory as it stands when the last one begins.
        let hidden = case.f32("hidden_captured"); // [layers, tokens, width]
        let states = |token: usize| -> Vec<f32> {
            let rows =
                (0..layers).map(|layer| &hidden[(layer * tokens + token) * width..][..width]);
            rows.flatten().copied().collect()
        };
        let mut memory = ReweaveMemory::default();
        let mut left = 0;
        for chunk in 0..tokens / segment {
            let start = chunk * segment;
            let known = relevance(start);
            while left + segment + window - 1 <= start {
                let scores: Vec<f32> = (left..left + segment).map(|t| known.of(t as u64)).collect();
                let picked = config.pick(&scores);
                let new = picked.iter().map(|&index| Captured {
                    position: (left + index) as u64,
                    relevance: scores[index],
                    segment: (left / segment) as u64,
                    states: states(left + index),
                });
                memory.push(&config, new.collect::<Vec<_>>(), chunk as u64);
                left += segment;
            }
        }
        let positions: Vec<i64> = memory.entries().iter().map(|e| e.position as i64).collect();
        assert_eq!(positions, case.i64("memory_pos"));
        let kept: Vec<f32> = memory.entries().iter().map(|e| e.relevance).collect();
        case.assert_close("memory_relevance", &kept);

        let part = |name: &str, index: usize, columns: usize| Matrix {
            data: case.f32(name)[index * width * columns..][..width * columns].to_vec(),
            columns,
        };
        let low_rank = |name: &str, index: usize| LowRank {
            up: part(&format!("p.{name}_u"), index, rank),
            down: part(&format!("p.{name}_v"), index, rank),
        };
        let one = |name: &str| case.f32(name)[0];
        let reweave = Reweave {
            align: (0..layers).map(|layer| low_rank("A", layer)).collect(),
            carry: (0..layers - 1).map(|layer| low_rank("B", layer)).collect(),
            beta: case.f32("p.beta"),
            weight: (one("p.lam_a"), one("p.lam_b")),
            projections: ["p.wq", "p.wk", "p.wv", "p.wo"].map(|name| part(name, 0, width)),
            gate: one("p.gate"),
            slopes: case.f32("p.slope"),
        };
        let vectors: Vec<f32> = memory
            .entries()
            .iter()
            .flat_map(|e| reweave.reconstruct(e))
            .collect();
        case.assert_close("memory_vectors", &vectors);
        let x = case.f32("x_in");
        let woven: Vec<f32> = x
            .chunks_exact(width)
            .enumerate()
            .flat_map(|(index, row)| {
                let position = (tokens - segment + index) as u64;
                reweave.weave(row, position, &memory, &vectors)
            })
            .collect();
        case.assert_close("y_out", &woven);
    }
}
