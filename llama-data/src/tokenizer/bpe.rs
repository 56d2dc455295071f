//! Byte pair encoding: merge the neighbours with the best rank, the leftmost among equals, until none can be merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

/// A part of a text: an id of the vocabulary, or what a vocabulary makes of a character outside it.
pub(super) type Symbol = u32;
pub(super) type Pair = (Symbol, Symbol);

/// No symbol, no rank.
const NONE: u32 = u32::MAX;
/// Symbols from which a queue pays.
const LONG: usize = 64;

/// Which pairs of symbols merge.
#[derive(Clone, Debug, Default)]
pub(super) struct Merges(FxHashMap<Pair, Merge>);

#[derive(Clone, Copy, Debug)]
pub(super) struct Merge {
    /// The lowest comes first.
    pub rank: u32,
    pub symbol: Symbol,
}

impl FromIterator<(Pair, Merge)> for Merges {
    fn from_iter<I: IntoIterator<Item = (Pair, Merge)>>(merges: I) -> Self {
        Self(merges.into_iter().collect())
    }
}

impl Merges {
    /// All of them, the best first.
    pub(super) fn ranked(&self) -> Vec<(Pair, Merge)> {
        let mut merges: Vec<_> = self.0.iter().map(|(pair, merge)| (*pair, *merge)).collect();
        merges.sort_unstable_by_key(|(pair, merge)| (merge.rank, *pair));
        merges
    }

    /// Merges what can be merged.
    pub(super) fn merge(&self, symbols: &mut Vec<Symbol>) {
        match symbols.len() {
            ..LONG => self.merge_short(symbols),
            _ => self.merge_long(symbols),
        }
    }

    fn rank(&self, left: Symbol, right: Symbol) -> u32 {
        self.0.get(&(left, right)).map_or(NONE, |merge| merge.rank)
    }

    /// Looks at the ranks of all pairs again and again: words are short.
    fn merge_short(&self, symbols: &mut Vec<Symbol>) {
        let mut ranks: Vec<u32> = symbols.windows(2).map(|pair| self.rank(pair[0], pair[1])).collect();
        while let Some((at, _)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank).filter(|best| *best.1 != NONE)
        {
            symbols[at] = self.0[&(symbols[at], symbols[at + 1])].symbol;
            symbols.remove(at + 1);
            ranks.remove(at);
            for (left, rank) in ranks.iter_mut().enumerate().skip(at.saturating_sub(1)).take(at.min(1) + 1) {
                *rank = self.rank(symbols[left], symbols[left + 1]);
            }
        }
    }

    /// The same with a queue, so that a line of a million bytes is not quadratic.
    fn merge_long(&self, symbols: &mut Vec<Symbol>) {
        // What is merged into its left neighbour becomes none; the others are a list linked both ways.
        let mut next: Vec<usize> = (1..=symbols.len()).collect();
        let mut previous: Vec<usize> = (0..=symbols.len()).map(|at| at.saturating_sub(1)).collect();
        let candidate = |symbols: &[Symbol], left: usize, right: usize| {
            let pair = (symbols[left], *symbols.get(right)?);
            self.0.get(&pair).map(|merge| Reverse((merge.rank, left, pair, merge.symbol)))
        };
        let mut queue: BinaryHeap<_> =
            (1..symbols.len()).filter_map(|right| candidate(symbols, right - 1, right)).collect();
        while let Some(Reverse((_, left, pair, merged))) = queue.pop() {
            // Either side may have been merged with something else meanwhile.
            let right = next[left];
            if symbols[left] != pair.0 || symbols.get(right) != Some(&pair.1) {
                continue;
            }
            symbols[left] = merged;
            symbols[right] = NONE;
            next[left] = next[right];
            previous[next[left]] = left;
            queue.extend(candidate(symbols, left, next[left]));
            if left > 0 {
                queue.extend(candidate(symbols, previous[left], left));
            }
        }
        symbols.retain(|symbol| *symbol != NONE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_ways_to_merge_agree(
            text in proptest::collection::vec(0u32..4, 0..200),
            merges in proptest::collection::hash_map((0u32..12, 0u32..12), 0u32..20, 0..40),
        ) {
            // Merges may have equal ranks, as pieces may have equal scores.
            let merges: Merges =
                merges.into_iter().map(|(pair, rank)| (pair, Merge { rank, symbol: 4 + rank % 8 })).collect();
            let (mut short, mut long) = (text.clone(), text);
            merges.merge_short(&mut short);
            merges.merge_long(&mut long);
            prop_assert_eq!(short, long);
        }
    }
}
