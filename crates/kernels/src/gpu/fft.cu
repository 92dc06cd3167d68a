// The long convolution (S4, Gu et al. 2022, and its kin) in one pass over the sequence, as FlashFFTConv (Fu et al. 2023)
// proposes: transform, product and way back stay in registers and shared memory. Sequences of a batch go two at a time, one
// as the real and one as the imaginary part; kernels are real, so that the parts do not mix. Compiled for one size, 2^LOG
// points transformed by a block, and one type of elements, ELEMENT.
//
// Cooley and Tukey's decimation in frequency: three passes of short transforms in a thread's registers, each in place, with
// one exchange through shared memory between passes. Spectra stay in the order and in the threads where the last pass leaves
// them, and the way back begins there.

constexpr int N = 1 << LOG;
// Points of a thread, threads, points of the passes' short transforms.
constexpr int HELD = LOG > 12 ? 32 : 16;
constexpr int THREADS = N / HELD;
constexpr int R0 = LOG > 12 ? 32 : LOG > 9 ? 16 : 8;
constexpr int R2 = LOG > 11 ? 16 : 8;
constexpr int R1 = N / R0 / R2;
// Two blocks of the large sizes on a multiprocessor, or one of the largest: 128 registers. Small ones: 80.
constexpr int BLOCKS = LOG > 13 ? 1 : LOG > 12 ? 2 : 768 / THREADS;

__device__ inline float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
__device__ inline float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }

// e^(i pi x)
__device__ inline float2 turned(float x) {
    float2 w;
    sincospif(x, &w.y, &w.x);
    return w;
}

// cos(2 pi m / 32); m is known when this is compiled, as in all that follows up to `short_transform`.
__device__ inline float cosine(int m) {
    m &= 31;
    m = m > 16 ? 32 - m : m;
    int n = m > 8 ? 16 - m : m;
    float c = n == 0   ? 1.f
              : n == 1 ? 0.98078528040323044913f
              : n == 2 ? 0.92387953251128675613f
              : n == 3 ? 0.83146961230254523708f
              : n == 4 ? 0.70710678118654752440f
              : n == 5 ? 0.55557023301960222474f
              : n == 6 ? 0.38268343236508977173f
              : n == 7 ? 0.19509032201612826785f
                       : 0.f;
    return m > 8 ? -c : c;
}

// x e^(-2 pi i m / 32), or back.
template <bool BACK>
__device__ inline float2 rotate(float2 x, int m) {
    if (BACK) m = -m;
    m &= 31;
    if (m == 0) return x;
    if (m == 8) return make_float2(x.y, -x.x);
    if (m == 16) return make_float2(-x.x, -x.y);
    if (m == 24) return make_float2(-x.y, x.x);
    return x * make_float2(cosine(m), -cosine(m - 8));
}

// The discrete Fourier transform of R points, in order; BACK: its inverse times R.
template <int R, bool BACK>
struct Short {
    static __device__ inline void run(float2 *v) {
        float2 rows[4][R / 4];
#pragma unroll
        for (int b = 0; b < R / 4; b++) {
            float2 s[4] = {v[b], v[R / 4 + b], v[2 * (R / 4) + b], v[3 * (R / 4) + b]};
            Short<4, BACK>::run(s);
#pragma unroll
            for (int k = 0; k < 4; k++) rows[k][b] = rotate<BACK>(s[k], b * k * (32 / R));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Short<R / 4, BACK>::run(rows[k]);
#pragma unroll
            for (int j = 0; j < R / 4; j++) v[k + 4 * j] = rows[k][j];
        }
    }
};

template <bool BACK>
struct Short<4, BACK> {
    static __device__ inline void run(float2 *v) {
        float2 a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = rotate<BACK>(v[1] - v[3], 8);
        v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
    }
};

template <bool BACK>
struct Short<2, BACK> {
    static __device__ inline void run(float2 *v) {
        float2 a = v[0];
        v[0] = a + v[1], v[1] = a - v[1];
    }
};

// v[k] w^k for w = e^(i pi x). The fourth power has a sine of its own: errors of w would grow with k.
template <int R>
__device__ inline void twist(float2 *v, float x) {
    float2 powers[4] = {make_float2(1.f, 0.f), turned(x)}, fourth = turned(4.f * x), base = fourth;
    powers[2] = powers[1] * powers[1], powers[3] = powers[2] * powers[1];
#pragma unroll
    for (int k = 1; k < 4; k++) v[k] = v[k] * powers[k];
#pragma unroll
    for (int a = 4; a < R; a += 4) {
        v[a] = v[a] * base;
#pragma unroll
        for (int k = 1; k < 4; k++) v[a + k] = v[a + k] * (base * powers[k]);
        base = base * fourth;
    }
}

// A pass of transforms of R points over spans of SPAN: this thread's transform q takes point i from `place`.
template <int R, int SPAN>
struct Pass {
    static constexpr int STEP = SPAN / R;

    static __device__ inline unsigned place(int q, int i) {
        unsigned at = threadIdx.x + THREADS * q;
        return at / STEP * SPAN + at % STEP + i * STEP;
    }

    // Padded, so that threads that are STEP or SPAN apart meet different banks.
    static __device__ inline unsigned padded(int q, int i) {
        unsigned at = place(q, i);
        return at + at / 16;
    }

    static __device__ inline void load(const float2 *shared, float2 *v) {
#pragma unroll
        for (int e = 0; e < HELD; e++) v[e] = shared[padded(e / R, e % R)];
    }

    static __device__ inline void store(float2 *shared, const float2 *v) {
#pragma unroll
        for (int e = 0; e < HELD; e++) shared[padded(e / R, e % R)] = v[e];
    }

    template <bool BACK>
    static __device__ inline void run(float2 *v) {
#pragma unroll
        for (int q = 0; q < HELD / R; q++) {
            float x = (float)((threadIdx.x + THREADS * q) % STEP) * (2.f / SPAN);
            if (BACK && STEP > 1) twist<R>(v + q * R, x);
            Short<R, BACK>::run(v + q * R);
            if (!BACK && STEP > 1) twist<R>(v + q * R, -x);
        }
    }
};

typedef Pass<R0, N> First;
typedef Pass<R1, N / R0> Second;
typedef Pass<R2, R2> Third;

extern __shared__ float2 shared[];

// Points in the first pass's places to the spectrum.
__device__ inline void there(float2 *v) {
    First::run<false>(v);
    First::store(shared, v);
    __syncthreads();
    Second::load(shared, v);
    Second::run<false>(v);
    Second::store(shared, v);
    __syncthreads();
    Third::load(shared, v);
    Third::run<false>(v);
}

// The spectrum to N times the points. A thread last reads what it writes first in `there`.
__device__ inline void back(float2 *v) {
    Third::run<true>(v);
    Third::store(shared, v);
    __syncthreads();
    Second::load(shared, v);
    Second::run<true>(v);
    Second::store(shared, v);
    __syncthreads();
    First::load(shared, v);
    First::run<true>(v);
}

// Where rows 2 pair and 2 pair + 1 of a channel stand in [batch, channels, length]; the second may be missing.
struct Pair {
    size_t first, second;
    bool both;
    __device__ Pair(unsigned pair, unsigned channel, unsigned batch, unsigned channels, unsigned length) {
        first = ((size_t)2 * pair * channels + channel) * length;
        second = first + (size_t)channels * length;
        both = 2 * pair + 1 < batch;
    }
};

__device__ inline void load(const ELEMENT *x, Pair pair, unsigned length, float2 *v) {
#pragma unroll
    for (int e = 0; e < HELD; e++) {
        unsigned at = First::place(e / R0, e % R0);
        v[e] = make_float2(0.f, 0.f);
        if (at < length) {
            v[e].x = get(x, pair.first + at);
            if (pair.both) v[e].y = get(x, pair.second + at);
        }
    }
}

__device__ inline void store(ELEMENT *y, Pair pair, unsigned length, const float2 *v) {
#pragma unroll
    for (int e = 0; e < HELD; e++) {
        unsigned at = First::place(e / R0, e % R0);
        if (at < length) {
            put(y, pair.first + at, v[e].x);
            if (pair.both) put(y, pair.second + at, v[e].y);
        }
    }
}

// The spectrum, over N, of each channel's kernels on a circle: the first `used` of `taps` from its start on, the first
// `reverse_used` of `reverse_taps` from its end on backwards. A block for each channel.
__device__ void spectrum(const ELEMENT *kernel, const ELEMENT *reverse, float2 *out, unsigned taps, unsigned used,
                         unsigned reverse_taps, unsigned reverse_used) {
    unsigned c = blockIdx.x;
    float2 v[HELD];
#pragma unroll
    for (int e = 0; e < HELD; e++) {
        unsigned at = First::place(e / R0, e % R0);
        v[e] = make_float2(0.f, 0.f);
        if (at < used) v[e].x = get(kernel, (size_t)c * taps + at);
        if (N - 1 - at < reverse_used) v[e].x = get(reverse, (size_t)c * reverse_taps + N - 1 - at);
    }
    there(v);
    out += (size_t)c * N;
#pragma unroll
    for (int e = 0; e < HELD; e++)
        out[e * THREADS + threadIdx.x] = make_float2(v[e].x * (1.f / N), v[e].y * (1.f / N));
}

// u [batch, channels, length] convolved; a block for each pair of rows, those of a channel side by side.
__device__ void convolve(const ELEMENT *u, const float2 *kernel, ELEMENT *y, unsigned batch, unsigned channels, unsigned length) {
    unsigned pairs = (batch + 1) / 2, c = blockIdx.x / pairs;
    Pair pair(blockIdx.x % pairs, c, batch, channels, length);
    kernel += (size_t)c * N;
    float2 v[HELD];
    load(u, pair, length, v);
    there(v);
#pragma unroll
    for (int e = 0; e < HELD; e++) v[e] = v[e] * kernel[e * THREADS + threadIdx.x];
    back(v);
    store(y, pair, length, v);
}

// The gradient of u, given that of y, g; and the spectra of the kernels' gradient, summed over the pairs of each of `parts`
// blocks of a channel: partial [channels, parts, N]. Registers have no room for two spectra: that of u waits where the sum of
// products will be, for later pairs in `waiting` [channels, parts, N].
__device__ void pull(const ELEMENT *u, const ELEMENT *g, const float2 *kernel, ELEMENT *grad_u, float2 *partial, float2 *waiting,
                     unsigned batch, unsigned channels, unsigned length, unsigned parts) {
    unsigned pairs = (batch + 1) / 2, c = blockIdx.x / parts, part = blockIdx.x % parts;
    kernel += (size_t)c * N;
    partial += (size_t)blockIdx.x * N;
    waiting += (size_t)blockIdx.x * N;
    for (unsigned p = part; p < pairs; p += parts) {
        Pair pair(p, c, batch, channels, length);
        bool start = p == part;
        float2 *input = start ? partial : waiting;
        float2 v[HELD];
        load(u, pair, length, v);
        there(v);
#pragma unroll
        for (int e = 0; e < HELD; e++) input[e * THREADS + threadIdx.x] = v[e];
        // All have read what the next transform overwrites.
        __syncthreads();
        load(g, pair, length, v);
        there(v);
#pragma unroll
        for (int e = 0; e < HELD; e++) {
            unsigned at = e * THREADS + threadIdx.x;
            float2 product = v[e] * conjugate(input[at]);
            partial[at] = start ? product : partial[at] + product;
            v[e] = v[e] * conjugate(kernel[at]);
        }
        back(v);
        store(grad_u, pair, length, v);
    }
}

// The kernels' gradients side by side, [channels, taps + reverse_taps], 0 beyond those used. A block for each channel.
__device__ void pull_taps(const float2 *partial, float *out, unsigned parts, unsigned taps, unsigned used,
                          unsigned reverse_taps, unsigned reverse_used) {
    unsigned c = blockIdx.x, width = taps + reverse_taps;
    partial += (size_t)c * parts * N;
    out += (size_t)c * width;
    float2 v[HELD];
#pragma unroll
    for (int e = 0; e < HELD; e++) v[e] = partial[e * THREADS + threadIdx.x];
    for (unsigned part = 1; part < parts; part++) {
        partial += N;
#pragma unroll
        for (int e = 0; e < HELD; e++) v[e] = v[e] + partial[e * THREADS + threadIdx.x];
    }
    back(v);
#pragma unroll
    for (int e = 0; e < HELD; e++) {
        unsigned at = First::place(e / R0, e % R0);
        if (at < used) out[at] = v[e].x * (1.f / N);
        if (N - 1 - at < reverse_used) out[taps + N - 1 - at] = v[e].x * (1.f / N);
    }
    for (unsigned j = threadIdx.x; j < width; j += THREADS)
        if (j < taps ? j >= used : j - taps >= reverse_used) out[j] = 0.f;
}

#define JOINED(NAME, TYPE) NAME##_##TYPE
#define NAMED(NAME, TYPE) JOINED(NAME, TYPE)
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)

KERNEL NAMED(fft_spectrum, KIND)(const ELEMENT *kernel, const ELEMENT *reverse, float2 *out, unsigned taps, unsigned used,
                                 unsigned reverse_taps, unsigned reverse_used) {
    spectrum(kernel, reverse, out, taps, used, reverse_taps, reverse_used);
}

KERNEL NAMED(fft_convolve, KIND)(const ELEMENT *u, const float2 *kernel, ELEMENT *y, unsigned batch, unsigned channels,
                                 unsigned length) {
    convolve(u, kernel, y, batch, channels, length);
}

KERNEL NAMED(fft_pull, KIND)(const ELEMENT *u, const ELEMENT *g, const float2 *kernel, ELEMENT *grad_u, float2 *partial,
                             float2 *waiting, unsigned batch, unsigned channels, unsigned length, unsigned parts) {
    pull(u, g, kernel, grad_u, partial, waiting, batch, channels, length, parts);
}

KERNEL fft_taps_f32(const float2 *partial, float *out, unsigned parts, unsigned taps, unsigned used, unsigned reverse_taps,
                    unsigned reverse_used) {
    pull_taps(partial, out, parts, taps, used, reverse_taps, reverse_used);
}
