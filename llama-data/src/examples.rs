//! Examples for fine-tuning: short texts of which only a part is trained on, packed into sequences.

use crate::DataError;
use crate::loader::{NO_TARGET, Sequences};
use crate::order::Order;

/// A text as tokens, and which of them the model is to learn to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token whether it is trained on. The first never is, since nothing is before it.
    pub trained: Vec<bool>,
}

impl Example {
    /// Appends tokens, all of them trained on or none.
    pub fn push(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend_from_slice(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }

    /// Inputs it has: tokens that have one after them.
    fn inputs(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    /// Whether there is anything to learn from its first `inputs` inputs.
    fn teaches(&self, inputs: usize) -> bool {
        self.trained.iter().skip(1).take(inputs).any(|trained| *trained)
    }
}

/// Examples in sequences of one length. Attention stays inside examples; what they leave of a sequence is filled with tokens
/// that nothing is trained on.
#[derive(Debug)]
pub struct ExampleSet {
    examples: Vec<Example>,
    /// Numbers of the examples in each sequence.
    packed: Vec<Vec<usize>>,
    order: Order,
    seq_len: usize,
    /// Examples that were too long and lost their end.
    pub cut: usize,
    /// Examples that were left out: nothing in them is trained on.
    pub useless: usize,
}

impl ExampleSet {
    /// Packs examples, in an order that `seed` gives, into as few sequences as first fit finds. What is longer than a sequence
    /// is cut.
    ///
    /// # Errors
    /// [`DataError::Examples`] if none can be trained on.
    pub fn new(examples: Vec<Example>, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        /// Sequences that are looked at for room: all of them would take time that grows with the square of the examples.
        const OPEN: usize = 256;
        let count = examples.len();
        let cut = examples.iter().filter(|example| example.inputs() > seq_len).count();
        let examples: Vec<Example> =
            examples.into_iter().filter(|example| example.teaches(example.inputs().min(seq_len))).collect();
        if examples.is_empty() {
            return Err(DataError::Examples(format!(
                "none of {count} examples has an answer in its first {seq_len} tokens; is this the right format?"
            )));
        }
        let shuffled = Order::new(examples.len() as u64, seed);
        let mut packed: Vec<Vec<usize>> = Vec::new();
        let mut room: Vec<usize> = Vec::new();
        for position in 0..examples.len() as u64 {
            let example = shuffled.window(position) as usize;
            let len = examples[example].inputs().min(seq_len);
            let first = packed.len().saturating_sub(OPEN);
            let place = (first..packed.len()).find(|&place| room[place] >= len).unwrap_or_else(|| {
                packed.push(Vec::new());
                room.push(seq_len);
                packed.len() - 1
            });
            packed[place].push(example);
            room[place] -= len;
        }
        let (useless, order) = (count - examples.len(), Order::new(packed.len() as u64, seed));
        Ok(Self { examples, packed, order, seq_len, cut, useless })
    }

    /// Examples that are trained on.
    pub fn examples(&self) -> usize {
        self.examples.len()
    }
}

impl Sequences for ExampleSet {
    fn seq_len(&self) -> usize {
        self.seq_len
    }

    fn sequences(&self) -> u64 {
        self.packed.len() as u64
    }

    fn read(&self, position: u64, inputs: &mut Vec<i32>, targets: &mut Vec<i32>, starts: &mut Option<Vec<i32>>) {
        let starts = starts.get_or_insert_default();
        let (first, end) = (inputs.len(), inputs.len() + self.seq_len);
        for &example in &self.packed[self.order.window(position) as usize] {
            let Example { tokens, trained } = &self.examples[example];
            let start = inputs.len();
            for ((pair, trained), _) in tokens.windows(2).zip(&trained[1..]).zip(start..end) {
                inputs.push(pair[0] as i32);
                targets.push(if *trained { pair[1] as i32 } else { NO_TARGET });
                starts.push((start - first) as i32);
            }
        }
        for place in inputs.len()..end {
            inputs.push(0);
            targets.push(NO_TARGET);
            starts.push((place - first) as i32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: std::ops::Range<u32>, answer: std::ops::Range<u32>) -> Example {
        let mut example = Example::default();
        example.push(&prompt.collect::<Vec<_>>(), false);
        example.push(&answer.collect::<Vec<_>>(), true);
        example
    }

    #[test]
    fn only_answers_are_targets_and_attention_stays_inside_examples() {
        let data = ExampleSet::new(vec![example(1..4, 4..6), example(10..12, 12..14)], 8, 0).unwrap();
        assert_eq!((data.sequences(), data.examples(), data.cut, data.useless), (1, 2, 0, 0));
        let batch = data.batch(0, 1);
        let first = if batch.inputs[0] == 1 { 0 } else { 3 };
        let at = |values: &[i32], from: usize, len: usize| values[from..from + len].to_vec();
        assert_eq!(at(&batch.inputs, first, 4), [1, 2, 3, 4]);
        assert_eq!(at(&batch.targets, first, 4), [-100, -100, 4, 5]);
        let second = if first == 0 { 4 } else { 0 };
        assert_eq!(at(&batch.inputs, second, 3), [10, 11, 12]);
        assert_eq!(at(&batch.targets, second, 3), [-100, 12, 13]);
        let starts = batch.starts.as_ref().unwrap();
        assert!(starts[first..first + 4].iter().all(|start| *start == first as i32));
        // The rest is filled with what sees itself alone.
        assert_eq!((batch.inputs[7], batch.targets[7], starts[7]), (0, NO_TARGET, 7));
        assert_eq!((batch.tokens(), batch.positions()), (4, 8));
    }

    #[test]
    fn long_examples_are_cut_and_useless_ones_left_out() {
        let data = vec![example(0..2, 2..40), example(0..20, 20..21), example(0..3, 0..0)];
        let data = ExampleSet::new(data, 8, 0).unwrap();
        assert_eq!((data.sequences(), data.examples(), data.cut, data.useless), (1, 1, 2, 2));
        assert_eq!(data.batch(0, 1).targets, [-100, 2, 3, 4, 5, 6, 7, 8]);
        let error = ExampleSet::new(vec![example(0..3, 0..0)], 8, 0).unwrap_err().to_string();
        assert!(error.contains("none of 1 examples"), "{error}");
    }

    proptest::proptest! {
        /// Every trained token of every example comes once in a pass, whatever the lengths.
        #[test]
        fn a_pass_has_every_answer_once(lengths in proptest::collection::vec((1u32..9, 1u32..9), 1..40), seed: u64) {
            let mut next = 0;
            let examples: Vec<Example> = lengths
                .iter()
                .map(|(prompt, answer)| {
                    let start = next;
                    next += prompt + answer;
                    example(start..start + prompt, start + prompt..next)
                })
                .collect();
            let mut expected: Vec<i32> = examples
                .iter()
                .flat_map(|e| e.tokens.iter().zip(&e.trained).filter(|(_, t)| **t).map(|(token, _)| *token as i32))
                .collect();
            let data = ExampleSet::new(examples, 17, seed).unwrap();
            for pass in 0..2 {
                let batch = data.batch(pass * data.sequences(), data.sequences() as usize);
                let mut found: Vec<i32> = batch.targets.into_iter().filter(|target| *target != NO_TARGET).collect();
                found.sort_unstable();
                expected.sort_unstable();
                proptest::prop_assert_eq!(&found, &expected);
            }
        }
    }
}
