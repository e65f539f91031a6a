//! Which blocks are plugged.

use std::ops::Range;

/// A bit for each block.
pub(super) struct Blocks {
    words: Vec<u64>,
    total: usize,
    plugged: usize,
}

impl Blocks {
    /// None of `total` blocks is plugged.
    pub(super) fn new(total: usize) -> Self {
        Self { words: vec![0; total.div_ceil(64)], total, plugged: 0 }
    }

    /// From saved words. None if they are not of `total` blocks.
    pub(super) fn from_words(words: Vec<u64>, total: usize) -> Option<Self> {
        let plugged = words.iter().map(|word| word.count_ones() as usize).sum();
        let blocks = Self { words, total, plugged };
        let fits = blocks.words.len() == total.div_ceil(64) && blocks.count(0..total) == plugged;
        fits.then_some(blocks)
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// How many of these are plugged.
    pub(super) fn count(&self, range: Range<usize>) -> usize {
        range
            .filter(|block| self.words.get(block / 64).is_some_and(|word| word >> (block % 64) & 1 == 1))
            .count()
    }

    /// Plugs or unplugs all of these.
    pub(super) fn set(&mut self, range: Range<usize>, plugged: bool) {
        self.plugged -= self.count(range.clone());
        for block in range {
            if let Some(word) = self.words.get_mut(block / 64) {
                *word = *word & !(1 << (block % 64)) | u64::from(plugged) << (block % 64);
                self.plugged += usize::from(plugged);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOTAL: usize = 150;

    fn ranges() -> impl Strategy<Value = Vec<(Range<usize>, bool)>> {
        let range = (0..TOTAL, 0..TOTAL).prop_map(|(a, b)| a.min(b)..a.max(b));
        prop::collection::vec((range, any::<bool>()), 0..20)
    }

    proptest! {
        #[test]
        fn they_are_what_was_set_last(steps in ranges()) {
            let mut blocks = Blocks::new(TOTAL);
            let mut model = [false; TOTAL];
            for (range, plugged) in steps {
                blocks.set(range.clone(), plugged);
                model[range.clone()].fill(plugged);
                prop_assert_eq!(blocks.count(range.clone()), if plugged { range.len() } else { 0 });
            }
            prop_assert_eq!(blocks.plugged(), model.iter().filter(|plugged| **plugged).count());
            for (block, plugged) in model.iter().enumerate() {
                prop_assert_eq!(blocks.count(block..block + 1), usize::from(*plugged));
            }
            let restored = Blocks::from_words(blocks.words().to_vec(), TOTAL).unwrap();
            prop_assert_eq!(restored.plugged(), blocks.plugged());
        }
    }

    #[test]
    fn words_of_other_blocks_are_refused() {
        assert!(Blocks::from_words(vec![0; 3], TOTAL).is_some());
        assert!(Blocks::from_words(vec![0; 2], TOTAL).is_none());
        assert!(Blocks::from_words(vec![0; 4], TOTAL).is_none());
        assert!(
            Blocks::from_words(vec![0, 0, 1 << (TOTAL - 128)], TOTAL).is_none(),
            "a block beyond the last"
        );
    }
}
