//! The checksum of footer and dynamic header (specification, "Checksum").

/// One's complement of the sum of all bytes, those of the checksum field counted as zero.
pub(super) fn ones_complement(bytes: &[u8], field: std::ops::Range<usize>) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    !(sum(bytes).wrapping_sub(sum(&bytes[field])))
}

#[cfg(test)]
mod tests {
    use super::ones_complement;

    #[test]
    fn skips_its_own_field() {
        assert_eq!(ones_complement(&[1, 2, 9, 9, 9, 9, 3], 2..6), !6);
    }
}
