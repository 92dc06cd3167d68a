//! How one page of cached keys and values lies in memory: the cache is the operand.
//!
//! A page holds [`PAGE`] token slots of one layer in two planes, K and V. Each plane is a run of
//! equal sections, one per kv head. Rows are interleaved in pairs for bf16, as a tile multiply wants
//! its right operand, and in fours for int8, as integer dot products do; so the kernels that have
//! such instructions never repack the cache:
//!
//! | dtype | K section | V section |
//! |---|---|---|
//! | f32  | `[head_dim][64]` | `[64][padded_dim]` |
//! | bf16 | `[head_dim/2][64][2]` (pairs along head_dim) | `[32][padded_dim][2]` (pairs of slots) |
//! | int8 | codes + 128 `[padded_dim/4][64][4]`, 64 f32 scales | codes `[16][padded_dim][4]`, 64 f32 scales |
//!
//! `padded_dim` is head_dim rounded up to 16. An int8 scale belongs to one slot of one head.

/// Token slots of one page.
pub const PAGE: usize = 64;

/// Storage type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// Exact reference storage, 4 bytes per element.
    F32,
    /// 2 bytes per element, rounded to nearest even, largest magnitude 65504: eight times as exact
    /// as bf16, for CPUs without bf16 tiles.
    F16,
    /// 2 bytes per element, rounded to nearest even: the operand of AMX tiles.
    Bf16,
    /// 1 byte per element and one f32 scale per slot and head: `x ~ code * max|row| / 127`.
    Int8,
}

/// Shape and type of every page of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Heads of K and V; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Elements of one key or value; even.
    pub head_dim: usize,
    /// Storage type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// head_dim rounded up to whole 16-lane vectors: the row width of a V section.
    pub(crate) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Bytes of one kv head's section of a plane; a multiple of 64.
    pub(crate) fn section_bytes(&self) -> usize {
        let elements = self.padded_dim() * PAGE;
        match self.dtype {
            KvDtype::F32 => elements * 4,
            KvDtype::F16 | KvDtype::Bf16 => elements * 2,
            KvDtype::Int8 => elements + PAGE * 4,
        }
    }

    /// Bytes of one plane (K or V) of one page: a multiple of 64. Give planes 64-byte alignment
    /// (kernels are right without it, and slower), and start them zeroed: slots that a tile
    /// declares invalid may hold stale data but no NaN or infinity.
    pub fn plane_bytes(&self) -> usize {
        self.num_kv_heads * self.section_bytes()
    }

    /// Writes keys to slots `slot..slot + n`. `rows`: n rows `[num_kv_heads, head_dim]`, row i at
    /// `rows[i * stride..]`; n is `rows.len() / stride` rounded up.
    ///
    /// # Panics
    /// When the plane, a row or the slots do not fit.
    pub fn write_keys(&self, plane: &mut [u8], slot: usize, rows: &[f32], stride: usize) {
        self.each_row(plane, slot, rows, stride, |section, slot, row| {
            match self.dtype {
                KvDtype::F32 => {
                    for (dim, &x) in row.iter().enumerate() {
                        put(section, (dim * PAGE + slot) * 4, x.to_ne_bytes());
                    }
                }
                KvDtype::F16 | KvDtype::Bf16 => {
                    for (pair, x) in row.chunks_exact(2).enumerate() {
                        let both =
                            self.half_bits(x[0]) as u32 | (self.half_bits(x[1]) as u32) << 16;
                        put(section, (pair * PAGE + slot) * 4, both.to_ne_bytes());
                    }
                }
                KvDtype::Int8 => {
                    let (scale, inverse) = int8_scale(row);
                    for (dim, &x) in row.iter().enumerate() {
                        section[(dim / 4 * PAGE + slot) * 4 + dim % 4] =
                            int8_code(x, inverse) ^ 0x80;
                    }
                    put(
                        section,
                        self.padded_dim() * PAGE + slot * 4,
                        scale.to_ne_bytes(),
                    );
                }
            }
        });
    }

    /// Writes values; arguments as for [`Self::write_keys`].
    ///
    /// # Panics
    /// When the plane, a row or the slots do not fit.
    pub fn write_values(&self, plane: &mut [u8], slot: usize, rows: &[f32], stride: usize) {
        let width = self.padded_dim();
        self.each_row(plane, slot, rows, stride, |section, slot, row| {
            match self.dtype {
                KvDtype::F32 => {
                    let at = slot * width * 4;
                    for (bytes, x) in section[at..].chunks_exact_mut(4).zip(row) {
                        bytes.copy_from_slice(&x.to_ne_bytes());
                    }
                }
                KvDtype::F16 | KvDtype::Bf16 => {
                    let at = (slot / 2) * width * 4;
                    let pairs = section[at..at + width * 4].chunks_exact_mut(4);
                    for (pair, &x) in pairs.zip(row) {
                        pair[slot % 2 * 2..][..2].copy_from_slice(&self.half_bits(x).to_ne_bytes());
                    }
                }
                KvDtype::Int8 => {
                    let (scale, inverse) = int8_scale(row);
                    let fours = section[slot / 4 * width * 4..].chunks_exact_mut(4);
                    for (four, &x) in fours.zip(row) {
                        four[slot % 4] = int8_code(x, inverse);
                    }
                    put(section, width * PAGE + slot * 4, scale.to_ne_bytes());
                }
            }
        });
    }

    /// Reads one key back as f32. `out`: `[head_dim]`.
    ///
    /// # Panics
    /// When the plane, the head, the slot or `out` do not fit.
    pub fn read_key(&self, plane: &[u8], kv_head: usize, slot: usize, out: &mut [f32]) {
        let section = &plane[kv_head * self.section_bytes()..][..self.section_bytes()];
        assert!(
            slot < PAGE && out.len() == self.head_dim,
            "slot {slot}, out {}",
            out.len()
        );
        for (dim, x) in out.iter_mut().enumerate() {
            *x = match self.dtype {
                KvDtype::F32 => f32_at(section, (dim * PAGE + slot) * 4),
                KvDtype::F16 | KvDtype::Bf16 => {
                    self.half_at(section, ((dim / 2 * PAGE + slot) * 2 + dim % 2) * 2)
                }
                KvDtype::Int8 => {
                    (section[(dim / 4 * PAGE + slot) * 4 + dim % 4] ^ 0x80) as i8 as f32
                        * f32_at(section, self.padded_dim() * PAGE + slot * 4)
                }
            };
        }
    }

    /// Reads one value back as f32. `out`: `[head_dim]`.
    ///
    /// # Panics
    /// When the plane, the head, the slot or `out` do not fit.
    pub fn read_value(&self, plane: &[u8], kv_head: usize, slot: usize, out: &mut [f32]) {
        let section = &plane[kv_head * self.section_bytes()..][..self.section_bytes()];
        assert!(
            slot < PAGE && out.len() == self.head_dim,
            "slot {slot}, out {}",
            out.len()
        );
        let width = self.padded_dim();
        for (dim, x) in out.iter_mut().enumerate() {
            *x = match self.dtype {
                KvDtype::F32 => f32_at(section, (slot * width + dim) * 4),
                KvDtype::F16 | KvDtype::Bf16 => {
                    self.half_at(section, ((slot / 2 * width + dim) * 2 + slot % 2) * 2)
                }
                KvDtype::Int8 => {
                    section[(slot / 4 * width + dim) * 4 + slot % 4] as i8 as f32
                        * f32_at(section, width * PAGE + slot * 4)
                }
            };
        }
    }

    /// A number in the layout's 16-bit type.
    fn half_bits(&self, x: f32) -> u16 {
        match self.dtype {
            KvDtype::F16 => half::f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits(),
            _ => bf16_bits(x),
        }
    }

    fn half_at(&self, section: &[u8], at: usize) -> f32 {
        match self.dtype {
            KvDtype::F16 => half::f16::from_ne_bytes([section[at], section[at + 1]]).to_f32(),
            _ => bf16_at(section, at),
        }
    }

    /// Calls `write(section of a kv head, slot, row of that head)` for each row and head.
    fn each_row(
        &self,
        plane: &mut [u8],
        slot: usize,
        rows: &[f32],
        stride: usize,
        write: impl Fn(&mut [u8], usize, &[f32]),
    ) {
        if rows.is_empty() {
            return;
        }
        let width = self.num_kv_heads * self.head_dim;
        assert!(
            stride >= width,
            "row stride {stride} is less than the row width {width}"
        );
        let count = rows.len().div_ceil(stride);
        assert!(
            slot + count <= PAGE,
            "slots {slot}..{} exceed a page of {PAGE}",
            slot + count
        );
        assert_eq!(plane.len(), self.plane_bytes(), "bytes of a plane");
        for (kv_head, section) in plane.chunks_exact_mut(self.section_bytes()).enumerate() {
            for index in 0..count {
                let row = &rows[index * stride + kv_head * self.head_dim..][..self.head_dim];
                write(section, slot + index, row);
            }
        }
    }
}

/// f32 to bf16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() {
        (bits >> 16) as u16 | 0x40
    } else {
        rounded as u16
    }
}

/// Scale of an int8 row and its inverse; both 0 for a row of zeros.
fn int8_scale(row: &[f32]) -> (f32, f32) {
    let max = row.iter().fold(0f32, |max, x| max.max(x.abs()));
    if max > 0.0 {
        (max / 127.0, 127.0 / max)
    } else {
        (0.0, 0.0)
    }
}

#[inline(always)]
fn int8_code(x: f32, inverse: f32) -> u8 {
    (x * inverse).round_ties_even() as i8 as u8
}

#[inline(always)]
fn put(section: &mut [u8], at: usize, bytes: [u8; 4]) {
    section[at..at + 4].copy_from_slice(&bytes);
}

fn f32_at(section: &[u8], at: usize) -> f32 {
    f32::from_ne_bytes(section[at..at + 4].try_into().expect("four bytes"))
}

fn bf16_at(section: &[u8], at: usize) -> f32 {
    let bits = u16::from_ne_bytes(section[at..at + 2].try_into().expect("two bytes"));
    f32::from_bits((bits as u32) << 16)
}
