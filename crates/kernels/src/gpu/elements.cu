// Elements of the types that our GPU kernels take, f32 and bf16, as f32: before every source of kernels.

typedef unsigned short bf16;

__device__ inline float get(const float *p, size_t i) { return p[i]; }
__device__ inline float get(const bf16 *p, size_t i) { return __uint_as_float((unsigned)p[i] << 16); }
__device__ inline void put(float *p, size_t i, float x) { p[i] = x; }
__device__ inline void put(bf16 *p, size_t i, float x) {
    unsigned bits = __float_as_uint(x);
    // To nearest, ties to even; what is not a number stays so.
    p[i] = x == x ? (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : (bf16)0x7fc0;
}

