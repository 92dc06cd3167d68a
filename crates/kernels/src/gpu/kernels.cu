// Kernels of the training path on a GPU, compiled when the first of them is asked for. Rows are those of row-major arrays;
// sums are made in f32 whatever the elements are, in an order that depends on sizes alone.

// The sum of `x` over the threads of a block (a multiple of 32, at most 1,024), for all of them.
__device__ inline float block_sum(float x) {
    __shared__ float warps[33];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        float y = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.f;
        for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(~0u, y, step);
        if (threadIdx.x == 0) warps[32] = y;
    }
    __syncthreads();
    return warps[32];
}

__device__ inline float block_max(float x) {
    __shared__ float warps[33];
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        float y = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : -__int_as_float(0x7f800000);
        for (int step = 16; step > 0; step /= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, step));
        if (threadIdx.x == 0) warps[32] = y;
    }
    __syncthreads();
    return warps[32];
}

// The keys [start, end) that the query of a row sees, among `keys` from position `from` on.
struct Seen {
    unsigned start, end;
    __device__ Seen(unsigned row, unsigned rows, unsigned keys, unsigned first, unsigned from, unsigned window) {
        unsigned position = first + row % rows;
        end = position < from ? 0 : min(keys, position - from + 1);
        start = position - from >= window && end > 0 ? min(position - from - window + 1, end) : 0;
    }
};

// softmax(scale x) over the keys that a query sees, 0 elsewhere; a block for each row: x [count rows, keys].
template <typename T>
__device__ void soften(const T *x, T *y, unsigned rows, unsigned keys, unsigned first, unsigned from, unsigned window,
                       float scale) {
    Seen seen(blockIdx.x, rows, keys, first, from, window);
    x += (size_t)blockIdx.x * keys;
    y += (size_t)blockIdx.x * keys;
    float top = -__int_as_float(0x7f800000), sum = 0.f;
    for (unsigned j = seen.start + threadIdx.x; j < seen.end; j += blockDim.x) top = fmaxf(top, scale * get(x, j));
    top = block_max(top);
    if (top == -__int_as_float(0x7f800000)) top = 0.f; // nothing is seen
    for (unsigned j = seen.start + threadIdx.x; j < seen.end; j += blockDim.x) sum += __expf(scale * get(x, j) - top);
    sum = block_sum(sum);
    float inverse = sum > 0.f ? 1.f / sum : 0.f;
    for (unsigned j = threadIdx.x; j < keys; j += blockDim.x) {
        bool inside = j >= seen.start && j < seen.end;
        put(y, j, inside ? __expf(scale * get(x, j) - top) * inverse : 0.f);
    }
}

// The gradient of soften's x, given its y and that one's gradient g.
template <typename T>
__device__ void pull(const T *y, const T *g, T *out, unsigned rows, unsigned keys, unsigned first, unsigned from,
                     unsigned window, float scale) {
    Seen seen(blockIdx.x, rows, keys, first, from, window);
    size_t at = (size_t)blockIdx.x * keys;
    y += at, g += at, out += at;
    float sum = 0.f;
    for (unsigned j = seen.start + threadIdx.x; j < seen.end; j += blockDim.x) sum += get(y, j) * get(g, j);
    sum = block_sum(sum);
    for (unsigned j = threadIdx.x; j < keys; j += blockDim.x) {
        bool inside = j >= seen.start && j < seen.end;
        put(out, j, inside ? scale * get(y, j) * (get(g, j) - sum) : 0.f);
    }
}

// x / sqrt(mean(x^2) + eps) weight; a block for each row.
template <typename T>
__device__ void rms_norm(const T *x, const T *weight, T *y, unsigned width, float eps) {
    size_t at = (size_t)blockIdx.x * width;
    x += at, y += at;
    float sum = 0.f;
    for (unsigned j = threadIdx.x; j < width; j += blockDim.x) sum += get(x, j) * get(x, j);
    float factor = rsqrtf(block_sum(sum) / width + eps);
    for (unsigned j = threadIdx.x; j < width; j += blockDim.x) put(y, j, get(x, j) * factor * get(weight, j));
}

// Gradients of x, and of the weight by block (partial [blocks, width], f32): blocks take rows in turn.
template <typename T>
__device__ void rms_norm_back(const T *x, const T *weight, const T *g, T *grad_x, float *partial, unsigned rows,
                              unsigned width, float eps) {
    extern __shared__ float grad_weight[];
    for (unsigned j = threadIdx.x; j < width; j += blockDim.x) grad_weight[j] = 0.f;
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        size_t at = (size_t)row * width;
        float squares = 0.f, products = 0.f;
        for (unsigned j = threadIdx.x; j < width; j += blockDim.x) {
            float v = get(x, at + j);
            squares += v * v;
            products += v * get(g, at + j) * get(weight, j);
        }
        float mean = block_sum(squares) / width + eps;
        float factor = rsqrtf(mean);
        float pulled = block_sum(products) * factor / (mean * width);
        for (unsigned j = threadIdx.x; j < width; j += blockDim.x) {
            float v = get(x, at + j), slope = get(g, at + j);
            grad_weight[j] += slope * v * factor;
            put(grad_x, at + j, slope * get(weight, j) * factor - v * pulled);
        }
    }
    for (unsigned j = threadIdx.x; j < width; j += blockDim.x) partial[(size_t)blockIdx.x * width + j] = grad_weight[j];
}

// Sums of columns over the rows of each block of rows: x [rows, width] to y [gridDim.y, width], f32. Blocks of 32 by 8.
template <typename T>
__device__ void sum_rows(const T *x, float *y, unsigned rows, unsigned width, unsigned rows_of_block) {
    __shared__ float parts[8][33];
    unsigned column = blockIdx.x * 32 + threadIdx.x, first = blockIdx.y * rows_of_block;
    unsigned last = min(rows, first + rows_of_block);
    float sum = 0.f;
    if (column < width)
        for (unsigned row = first + threadIdx.y; row < last; row += 8) sum += get(x, (size_t)row * width + column);
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
        y[(size_t)blockIdx.y * width + column] = sum;
    }
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

// silu(x) up, or silu(x) where up is null.
template <typename T>
__device__ void silu_gate(const T *x, const T *up, T *y, size_t count) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        float v = get(x, i);
        put(y, i, v * sigmoid(v) * (up ? get(up, i) : 1.f));
    }
}

template <typename T>
__device__ void silu_gate_back(const T *x, const T *up, const T *g, T *grad_x, T *grad_up, size_t count) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        float v = get(x, i), s = sigmoid(v), slope = get(g, i);
        put(grad_x, i, slope * (up ? get(up, i) : 1.f) * s * (1.f + v * (1.f - s)));
        if (up) put(grad_up, i, slope * v * s);
    }
}

// x [documents length, heads width] to [documents, heads, length, width] (or back), each head turned by the angles of its
// token: cos and sin [documents length, half], pairs (m, half + m); `sign` -1 turns back. half = 0: not turned.
template <typename T, bool BACK>
__device__ void heads(const T *x, const T *cosine, const T *sine, T *y, unsigned count, unsigned heads, unsigned length,
                      unsigned width, unsigned half, float sign) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        unsigned e = i % width, rest = i / width, token, head, from;
        if (BACK) {
            head = rest % heads, token = rest / heads;
            from = ((token / length * heads + head) * length + token % length) * width;
        } else {
            unsigned l = rest % length;
            head = rest / length % heads, token = rest / length / heads * length + l;
            from = (token * heads + head) * width;
        }
        float value = get(x, from + e);
        if (e < 2 * half) {
            unsigned m = e < half ? e : e - half;
            float c = get(cosine, token * half + m), s = sign * get(sine, token * half + m);
            value = e < half ? value * c - get(x, from + e + half) * s : value * c + get(x, from + m) * s;
        }
        put(y, i, value);
    }
}

// y[b, l] = bias + sum over taps k of weight[., k] x[b, l + k + 1], x [batch, taps + length, width], weight [width, taps].
template <typename T>
__device__ void depthwise(const T *x, const T *weight, const T *bias, T *y, unsigned count, unsigned length,
                          unsigned width, unsigned taps) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        unsigned w = i % width, row = i / width;
        const T *read = x + ((size_t)(row / length) * (taps + length) + row % length + 1) * width + w;
        float sum = bias ? get(bias, w) : 0.f;
        for (unsigned k = 0; k < taps; k++) sum += get(weight, w * taps + k) * get(read, (size_t)k * width);
        put(y, i, sum);
    }
}

// The gradient of depthwise's x: row r gets the sum of weight[., k] g[r - 1 - k]. count = that of x.
template <typename T>
__device__ void depthwise_back(const T *weight, const T *g, T *grad_x, unsigned count, unsigned length, unsigned width,
                               unsigned taps) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        unsigned w = i % width, row = i / width, r = row % (taps + length);
        const T *from = g + (size_t)(row / (taps + length)) * length * width + w;
        float sum = 0.f;
        for (unsigned k = 0; k < taps; k++)
            if (r >= k + 1 && r - k - 1 < length) sum += get(weight, w * taps + k) * get(from, (size_t)(r - k - 1) * width);
        put(grad_x, i, sum);
    }
}

// The gradient of depthwise's weight, by block of rows of g [rows, width]: partial [gridDim.y, width taps], f32. Blocks of 32
// by 8, at most 8 taps.
template <typename T>
__device__ void depthwise_weight(const T *x, const T *g, float *partial, unsigned rows, unsigned length, unsigned width,
                                 unsigned taps, unsigned rows_of_block) {
    __shared__ float parts[8][33];
    unsigned w = blockIdx.x * 32 + threadIdx.x, first = blockIdx.y * rows_of_block;
    unsigned last = min(rows, first + rows_of_block);
    float sums[8] = {};
    if (w < width)
        for (unsigned row = first + threadIdx.y; row < last; row += 8) {
            const T *read = x + ((size_t)(row / length) * (taps + length) + row % length + 1) * width + w;
            float slope = get(g, (size_t)row * width + w);
            for (unsigned k = 0; k < 8; k++)
                if (k < taps) sums[k] += slope * get(read, (size_t)k * width);
        }
    for (unsigned k = 0; k < taps; k++) {
        __syncthreads();
        float sum = 0.f;
        for (unsigned i = 0; i < 8; i++)
            if (i == k) sum = sums[i];
        parts[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y == 0 && w < width) {
            for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
            partial[((size_t)blockIdx.y * width + w) * taps + k] = sum;
        }
    }
}

// Each row of x [rows, width] times its factor [rows].
template <typename T>
__device__ void scale_rows(const T *x, const T *factor, T *y, unsigned count, unsigned width) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        put(y, i, get(x, i) * get(factor, i / width));
}

// Its gradients; a warp for each row, eight to a block.
template <typename T>
__device__ void scale_rows_back(const T *x, const T *factor, const T *g, T *grad_x, T *grad_factor, unsigned rows,
                                unsigned width) {
    unsigned row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    float sum = 0.f, by = get(factor, row);
    for (unsigned j = threadIdx.x % 32; j < width; j += 32) {
        size_t at = (size_t)row * width + j;
        sum += get(x, at) * get(g, at);
        put(grad_x, at, by * get(g, at));
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) put(grad_factor, row, sum);
}

// y[h, i, j] = e^(sums[h, i] - sums[h, j]) scores[h / share, i, j] where j <= i, 0 elsewhere: sums [heads, q], scores
// [heads / share, q, q].
template <typename T>
__device__ void decayed(const float *sums, const T *scores, T *y, unsigned count, unsigned q, unsigned share) {
    for (unsigned at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        unsigned j = at % q, i = at / q % q, h = at / q / q;
        float value = 0.f;
        if (j <= i) value = __expf(sums[h * q + i] - sums[h * q + j]) * get(scores, (h / share * q + i) * q + j);
        put(y, at, value);
    }
}

// The gradient of decayed's sums: row sums of y g minus column sums; a block for each head, 256 threads.
template <typename T>
__device__ void decayed_sums(const T *y, const T *g, float *grad, unsigned q) {
    size_t first = (size_t)blockIdx.x * q * q;
    for (unsigned j = threadIdx.x; j < q; j += blockDim.x) {
        float column = 0.f;
        for (unsigned i = j; i < q; i++) column += get(y, first + i * q + j) * get(g, first + i * q + j);
        grad[blockIdx.x * q + j] = -column;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x / 32; i < q; i += blockDim.x / 32) {
        float row = 0.f;
        for (unsigned j = threadIdx.x % 32; j <= i; j += 32) row += get(y, first + i * q + j) * get(g, first + i * q + j);
        for (int step = 16; step > 0; step /= 2) row += __shfl_xor_sync(~0u, row, step);
        if (threadIdx.x % 32 == 0) grad[blockIdx.x * q + i] += row;
    }
}

// The gradient of decayed's scores: count = that of scores.
template <typename T>
__device__ void decayed_scores(const float *sums, const T *g, T *grad, unsigned count, unsigned q, unsigned share) {
    for (unsigned at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        unsigned j = at % q, i = at / q % q, group = at / q / q;
        float value = 0.f;
        if (j <= i)
            for (unsigned h = group * share; h < (group + 1) * share; h++)
                value += __expf(sums[h * q + i] - sums[h * q + j]) * get(g, ((size_t)h * q + i) * q + j);
        put(grad, at, value);
    }
}

#define BOTH(T, S)                                                                                                        \
    extern "C" __global__ void soften_##S(const T *x, T *y, unsigned rows, unsigned keys, unsigned first, unsigned from,  \
                                          unsigned window, float scale) {                                                 \
        soften(x, y, rows, keys, first, from, window, scale);                                                             \
    }                                                                                                                     \
    extern "C" __global__ void pull_##S(const T *y, const T *g, T *out, unsigned rows, unsigned keys, unsigned first,     \
                                        unsigned from, unsigned window, float scale) {                                    \
        pull(y, g, out, rows, keys, first, from, window, scale);                                                          \
    }                                                                                                                     \
    extern "C" __global__ void rms_norm_##S(const T *x, const T *weight, T *y, unsigned width, float eps) {               \
        rms_norm(x, weight, y, width, eps);                                                                               \
    }                                                                                                                     \
    extern "C" __global__ void rms_norm_back_##S(const T *x, const T *weight, const T *g, T *grad_x, float *partial,      \
                                                 unsigned rows, unsigned width, float eps) {                              \
        rms_norm_back(x, weight, g, grad_x, partial, rows, width, eps);                                                   \
    }                                                                                                                     \
    extern "C" __global__ void sum_rows_##S(const T *x, float *y, unsigned rows, unsigned width, unsigned of_block) {     \
        sum_rows(x, y, rows, width, of_block);                                                                            \
    }                                                                                                                     \
    extern "C" __global__ void silu_##S(const T *x, T *y, unsigned count) {                                               \
        silu_gate(x, (const T *)0, y, count);                                                                             \
    }                                                                                                                     \
    extern "C" __global__ void silu_gate_##S(const T *x, const T *up, T *y, unsigned count) {                             \
        silu_gate(x, up, y, count);                                                                                       \
    }                                                                                                                     \
    extern "C" __global__ void silu_back_##S(const T *x, const T *g, T *grad_x, unsigned count) {                         \
        silu_gate_back(x, (const T *)0, g, grad_x, (T *)0, count);                                                        \
    }                                                                                                                     \
    extern "C" __global__ void silu_gate_back_##S(const T *x, const T *up, const T *g, T *grad_x, T *grad_up,             \
                                                  unsigned count) {                                                       \
        silu_gate_back(x, up, g, grad_x, grad_up, count);                                                                 \
    }                                                                                                                     \
    extern "C" __global__ void split_heads_##S(const T *x, const T *c, const T *s, T *y, unsigned count, unsigned h,      \
                                               unsigned l, unsigned w, unsigned half, float sign) {           \
        heads<T, false>(x, c, s, y, count, h, l, w, half, sign);                                                       \
    }                                                                                                                     \
    extern "C" __global__ void join_heads_##S(const T *x, const T *c, const T *s, T *y, unsigned count, unsigned h,       \
                                              unsigned l, unsigned w, unsigned half, float sign) {            \
        heads<T, true>(x, c, s, y, count, h, l, w, half, sign);                                                        \
    }

#define CONVOLUTIONS(T, S)                                                                                                \
    extern "C" __global__ void depthwise_##S(const T *x, const T *weight, T *y, unsigned count, unsigned length,          \
                                             unsigned width, unsigned taps) {                                             \
        depthwise(x, weight, (const T *)0, y, count, length, width, taps);                                                \
    }                                                                                                                     \
    extern "C" __global__ void depthwise_bias_##S(const T *x, const T *weight, const T *bias, T *y, unsigned count,       \
                                                  unsigned length, unsigned width, unsigned taps) {                       \
        depthwise(x, weight, bias, y, count, length, width, taps);                                                        \
    }                                                                                                                     \
    extern "C" __global__ void depthwise_back_##S(const T *weight, const T *g, T *grad_x, unsigned count,                 \
                                                  unsigned length, unsigned width, unsigned taps) {                       \
        depthwise_back(weight, g, grad_x, count, length, width, taps);                                                    \
    }                                                                                                                     \
    extern "C" __global__ void depthwise_weight_##S(const T *x, const T *g, float *partial, unsigned rows,                \
                                                    unsigned length, unsigned width, unsigned taps, unsigned of_block) {  \
        depthwise_weight(x, g, partial, rows, length, width, taps, of_block);                                             \
    }

#define SCANS(T, S)                                                                                                       \
    extern "C" __global__ void scale_rows_##S(const T *x, const T *factor, T *y, unsigned count, unsigned width) {        \
        scale_rows(x, factor, y, count, width);                                                                           \
    }                                                                                                                     \
    extern "C" __global__ void scale_rows_back_##S(const T *x, const T *factor, const T *g, T *grad_x, T *grad_factor,    \
                                                   unsigned rows, unsigned width) {                                       \
        scale_rows_back(x, factor, g, grad_x, grad_factor, rows, width);                                                  \
    }                                                                                                                     \
    extern "C" __global__ void decayed_##S(const T *scores, const float *sums, T *y, unsigned count, unsigned q,          \
                                           unsigned share) {                                                              \
        decayed(sums, scores, y, count, q, share);                                                                        \
    }                                                                                                                     \
    extern "C" __global__ void decayed_sums_##S(const T *y, const T *g, float *grad, unsigned q) {                        \
        decayed_sums(y, g, grad, q);                                                                                      \
    }                                                                                                                     \
    extern "C" __global__ void decayed_scores_##S(const T *g, const float *sums, T *grad, unsigned count, unsigned q,     \
                                                  unsigned share) {                                                       \
        decayed_scores(sums, g, grad, count, q, share);                                                                   \
    }

SCANS(float, f32)
SCANS(bf16, bf16)
CONVOLUTIONS(float, f32)
CONVOLUTIONS(bf16, bf16)

BOTH(float, f32)
BOTH(bf16, bf16)
