//! The few little-endian records that saved sessions are made of.

use std::io::{self, Read, Write};

/// Writes one integer.
pub fn write_u64(out: &mut dyn Write, value: u64) -> io::Result<()> {
    out.write_all(&value.to_le_bytes())
}

/// Reads one integer.
pub fn read_u64(input: &mut dyn Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes a length and that many bytes.
pub fn write_bytes(out: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    write_u64(out, bytes.len() as u64)?;
    out.write_all(bytes)
}

/// Reads bytes written by [`write_bytes`]. A hostile length costs no more memory than the input
/// has bytes.
pub fn read_bytes(input: &mut dyn Read) -> io::Result<Vec<u8>> {
    let len = read_u64(input)?;
    let mut bytes = Vec::new();
    input.take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != len {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("found {} bytes, expected {len}", bytes.len()),
        ));
    }
    Ok(bytes)
}

/// Writes a list of f32.
pub fn write_f32s(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    write_bytes(out, &bytes)
}

/// Reads a list of f32.
pub fn read_f32s(input: &mut dyn Read) -> io::Result<Vec<f32>> {
    let bytes = read_bytes(input)?;
    Ok(bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect())
}
