// The selective scan on a CPU, float32: forward and backward. README.md beside this file has the
// mathematics; cpp.py builds and calls this. No dependency but a C++17 compiler with vector
// extensions (g++, clang++); OpenMP where there is one.
//
// B batch, G groups, H channels per group, L tokens, N state; NP is N padded to whole parts.
//
// Channels lie over vector lanes, the states of a part stay in registers, tokens follow each other.
// Tokens are taken in tiles of TILE: inputs are transposed from (channel, token) into lanes tile by
// tile, and the state at each tile's start is kept for the backward pass, which computes a tile's
// states again and then walks the tile from its end. A task is (item, group, range of channel
// blocks, chunk of tiles); chunks are used when the others are fewer than the threads, at the
// price of a second sweep. Sums over channels (for the gradients of B and C) go through per-task
// buffers that are added in a fixed order: results do not depend on the timing of threads.
//
// Never compile this with -ffast-math: it removes the rounding by adding and subtracting SHIFT.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif
#define TILE 32  // tokens; cpp.py has the same number
#define LINE 16  // floats of a cache line
#define LINES (TILE / LINE)

namespace {

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
inline vec load_some(const float* p, int lanes) {
  vec x = {};
  std::memcpy(&x, p, 4 * lanes);
  return x;
}
inline void store_some(float* p, vec x, int lanes) { std::memcpy(p, &x, 4 * lanes); }
inline vec splat(float x) { return x - vec{}; }
inline vec select(ivec condition, vec yes, vec no) { return condition ? yes : no; }

// 2^(whole + f) for |f| <= 1/2, relative error below 2e-7, exactly 1 at 0. `shifted` is whole plus
// 1.5 * 2^23, which has the integer in its low bits.
const float SHIFT = 12582912.f;
inline vec power(vec f, vec whole, vec shifted) {
  vec p = splat(1.32647271e-3f);
  p = p * f + 9.67151286e-3f;
  p = p * f + 5.55073375e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  (void)shifted;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  (void)whole;
  return (vec)((ivec)p + ((ivec)shifted << 23));
#endif
}

// 2^x
inline vec exp2_(vec x) {
#if defined(__AVX512F__)
  vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  return power(x - whole, whole, whole);
#else
  // Clamped to the range of normal numbers (2^128 is infinite). x is the operand that max and min
  // hand on when it is NaN.
#if defined(__AVX__)
  x = (vec)_mm256_max_ps((__m256)splat(-126.f), (__m256)x);
  x = (vec)_mm256_min_ps((__m256)splat(128.f), (__m256)x);
#else
  x = select(x < -126.f, splat(-126.f), x);
  x = select(x > 128.f, splat(128.f), x);
#endif
  vec shifted = x + SHIFT, whole = shifted - SHIFT;
  return power(x - whole, whole, shifted);
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;

// e^x for x <= 0, with the relative error of exp2_ even where x * log2(e) would round too coarsely:
// whole * ln(2) is subtracted in two parts, of which the first product is exact.
inline vec exp_negative(vec x) {
  x = select(x < -87.f, splat(-87.f), x);
  vec shifted = x * LOG2E + SHIFT, whole = shifted - SHIFT;
  vec f = ((x - whole * 0.693359375f) + whole * 2.12194440e-4f) * LOG2E;
  return power(f, whole, shifted);
}

// softplus(x) and its derivative, both with a small relative error at any x.
inline void softplus(vec x, vec& value, vec& slope) {
  vec e = exp_negative(select(x > 0.f, -x, x));
  vec inverse = 1.f / (e + 1.f);
  slope = select(x > 0.f, inverse, e * inverse);
  vec r = e / (e + 2.f), s = r * r;  // log(1 + e) = 2 atanh(e / (2 + e))
  vec p = splat(1.40059974e-1f);
  p = p * s + 1.40009019e-1f;
  p = p * s + 2.00107637e-1f;
  p = p * s + 3.33332081e-1f;
  p = p * s + 1.f;
  value = (2.f * r) * p + select(x > 0.f, x, vec{});
}

// Lane tricks ------------------------------------------------------------------------------------

#if defined(__clang__)
#define HAVE_SHUFFLE 0
#else
#define HAVE_SHUFFLE 1
// Lanes whose bit S is clear come from a, the others from b S lanes to the left; and the converse.
template <int S> inline vec take_low(vec a, vec b) {
  ivec pick;
  for (int i = 0; i < W; ++i) pick[i] = (i & S) ? W + i - S : i;
  return __builtin_shuffle(a, b, pick);
}
template <int S> inline vec take_high(vec a, vec b) {
  ivec pick;
  for (int i = 0; i < W; ++i) pick[i] = (i & S) ? W + i : i + S;
  return __builtin_shuffle(a, b, pick);
}
template <int S> inline void exchange(vec* r) {
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      vec a = r[i], b = r[i + S];
      r[i] = take_low<S>(a, b);
      r[i + S] = take_high<S>(a, b);
    }
}
template <int S> inline void fold(vec* r) {
  for (int i = 0; i < W; i += 2 * S)
    r[i] = take_low<S>(r[i], r[i + S]) + take_high<S>(r[i], r[i + S]);
}
#endif

inline void transpose(vec* r) {
#if HAVE_SHUFFLE
  exchange<1>(r);
  exchange<2>(r);
#if W >= 8
  exchange<4>(r);
#endif
#if W >= 16
  exchange<8>(r);
#endif
#else
  vec out[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) out[i][j] = r[j][i];
  std::memcpy(r, out, sizeof out);
#endif
}

// Lane i of the result is the sum of the lanes of r[i]; r is overwritten.
inline vec lane_sums(vec* r) {
#if HAVE_SHUFFLE
  fold<1>(r);
  fold<2>(r);
#if W >= 8
  fold<4>(r);
#endif
#if W >= 16
  fold<8>(r);
#endif
  return r[0];
#else
  vec out = {};
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) out[i] += r[i][j];
  return out;
#endif
}

// A (batch, channel, token) tensor; the token stride is negated by the caller when scanning in
// reverse, with the pointer at the last token.
struct View {
  float* data;
  int64_t batch, channel, token;
  float* at(int64_t b, int64_t c, int64_t t) const {
    return data + b * batch + c * channel + t * token;
  }
};

// `count` tokens of `lanes` channels into out[token][lane]; the other lanes become 0.
void read_tile(const View& x, int64_t b, int64_t c, int64_t t, int lanes, int count, vec* out) {
  int done = 0;
  if (x.channel == 1 && lanes == W) {
    for (; done < count; ++done) out[done] = load(x.at(b, c, t + done));
  } else if (x.token == 1 || x.token == -1) {
    for (; done + W <= count; done += W) {
      vec rows[W];
      const float* p = x.at(b, c, x.token == 1 ? t + done : t + done + W - 1);
      for (int i = 0; i < W; ++i) rows[i] = i < lanes ? load(p + i * x.channel) : vec{};
      transpose(rows);
      for (int i = 0; i < W; ++i) out[done + i] = rows[x.token == 1 ? i : W - 1 - i];
    }
  }
  for (; done < count; ++done) {
    const float* p = x.at(b, c, t + done);
    vec row = {};
    for (int i = 0; i < lanes; ++i) row[i] = p[i * x.channel];
    out[done] = row;
  }
}

// Asks for the tile that comes next, a line per view and token while this one is computed: a
// channel's tokens lie far from those of its neighbours, in too many streams for the processor to
// foresee, and all requests at once would fill its queue and stop it.
template <int READS, int WRITES> struct Ahead {
  const float* first[READS + WRITES];
  int64_t channel[READS + WRITES];
  int lines = 0;  // per view
  // Views in the order of READS, then WRITES; channels from c, tokens from t.
  void aim(const View* const* views, int64_t b, int64_t c, int64_t t, int lanes, int count) {
    lines = lanes * LINES;
    for (int k = 0; k < READS + WRITES; ++k) {
      const View& x = *views[k];
      const bool along = x.token == 1 || x.token == -1;
      first[k] = x.at(b, c, x.token == -1 ? t + count - 1 : t);
      channel[k] = along ? x.channel : 0;  // else neighbours share lines, which are foreseen
    }
  }
  // (Always inline: else g++ takes it for a function without effect.)
  __attribute__((always_inline)) void fetch(int i) const {
    if (i >= lines) return;
    for (int k = 0; k < READS + WRITES; ++k) {
      const float* p = first[k] + i / LINES * channel[k] + i % LINES * LINE;
      if (k < READS)
        __builtin_prefetch(p, 0);
      else
        __builtin_prefetch(p, 1);
    }
  }
};

void write_tile(const View& x, int64_t b, int64_t c, int64_t t, int lanes, int count,
                const vec* in) {
  int done = 0;
  if (x.channel == 1 && lanes == W) {
    for (; done < count; ++done) store(x.at(b, c, t + done), in[done]);
  } else if (x.token == 1 || x.token == -1) {
    for (; done + W <= count; done += W) {
      vec rows[W];
      for (int i = 0; i < W; ++i) rows[i] = in[done + (x.token == 1 ? i : W - 1 - i)];
      transpose(rows);
      float* p = x.at(b, c, x.token == 1 ? t + done : t + done + W - 1);
      for (int i = 0; i < lanes; ++i) store(p + i * x.channel, rows[i]);
    }
  }
  for (; done < count; ++done) {
    float* p = x.at(b, c, t + done);
    for (int i = 0; i < lanes; ++i) p[i * x.channel] = in[done][i];
  }
}

}  // namespace

extern "C" {

// Filled by cpp.py; every member is 8 bytes. Absent tensors are null.
struct Arguments {
  int64_t batch, groups, group_dim, length, padded_state, softplus, threads;
  View u, delta, y;         // y: output
  const float *A, *B, *C;   // (G, NP, H), (B, G, L, NP) twice, in scan order
  const float *D, *bias;    // (G * H) or null
  float* starts;            // (tiles + 1, B, G, NP, H): state before each tile, and at the end
  // Backward only:
  View grad_y, grad_u, grad_delta;
  const float* grad_last;   // (B, G, NP, H) or null
  float *grad_A;            // (B, G, NP, H), to be summed over B
  float *grad_B, *grad_C;   // (B, G, L, NP)
  float *grad_D, *grad_bias;  // (B, G * H), to be summed over B
};
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut into tasks.
struct Grid {
  int64_t tiles, blocks, splits, blocks_per_split, chunks, tiles_per_chunk, items;
  explicit Grid(const Arguments& a) {
    tiles = ceil_div(a.length, TILE);
    blocks = ceil_div(a.group_dim, W);
    items = a.batch * a.groups;
    splits = items >= a.threads ? 1 : ceil_div(a.threads, items);
    splits = splits < blocks ? splits : blocks;
    blocks_per_split = ceil_div(blocks, splits);
    splits = ceil_div(blocks, blocks_per_split);
    chunks = ceil_div(a.threads, items * splits);
    if (chunks < 3) chunks = 1;  // two chunks do twice the work with twice the threads
    chunks = chunks < tiles ? chunks : tiles;
    tiles_per_chunk = ceil_div(tiles, chunks);
    chunks = ceil_div(tiles, tiles_per_chunk);
  }
  int64_t tasks() const { return items * splits * chunks; }
};

// Run task(0..count-1) on the threads; each takes the next one when it is free.
template <class Task> void parallel(int64_t count, int64_t threads, Task task) {
  if (threads > count) threads = count;
#if defined(_OPENMP)
  if (threads > 1) {
    std::atomic<int64_t> next(0);
#pragma omp parallel num_threads((int)threads)
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) task(i);
}

int tile_tokens(const Arguments& a, int64_t tile) {
  int64_t left = a.length - tile * TILE;
  return (int)(left < TILE ? left : TILE);
}
int block_lanes(const Arguments& a, int64_t block) {
  int64_t left = a.group_dim - block * W;
  return (int)(left < W ? left : W);
}
int64_t state_size(const Arguments& a) { return a.padded_state * a.group_dim; }  // per item

// Step of one tile, and with SLOPE its derivative.
template <bool SLOPE>
void make_steps(const Arguments& a, int64_t b, int64_t c, int64_t t, int lanes, int count,
                vec* step, vec* slope) {
  read_tile(a.delta, b, c, t, lanes, count, step);
  vec bias = a.bias ? load_some(a.bias + c, lanes) : vec{};
  for (int i = 0; i < count; ++i) {
    vec x = step[i] + bias, s = splat(1.f);
    if (a.softplus) softplus(x, x, s);
    step[i] = x;
    if (SLOPE) slope[i] = s;
  }
}

// Forward ----------------------------------------------------------------------------------------

// One part of NB states over one tile: h[n] in and out, y added to.
template <int NB, bool OUT>
void forward_part(int count, int NP, const vec* step, const vec* input, const float* A, int64_t lda,
                  const float* B, const float* C, int lanes, const Ahead<2, OUT>& ahead,
                  vec* h_io, vec* y) {
  vec h[NB], rate[NB];
  for (int n = 0; n < NB; ++n) {
    h[n] = h_io[n];
    rate[n] = load_some(A + n * lda, lanes) * LOG2E;
  }
  for (int i = 0; i < count; ++i, B += NP, C += NP) {
    vec d = step[i], x = input[i], sum = {};
    ahead.fetch(i);
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      h[n] = exp2_(d * rate[n]) * h[n] + x * B[n];
      if (OUT) sum += h[n] * C[n];
    }
    if (OUT) y[i] += sum;
  }
  for (int n = 0; n < NB; ++n) h_io[n] = h[n];
}

// Sweep the tiles [first, last) of some channel blocks. starts[first] is given; with OUT the states
// go to starts[first + 1 ...] and y is written, else the state after the last tile goes to `end`
// and the sum of the steps to `sum_step`, which are laid out like one row of starts and like D.
template <int NB, bool OUT>
void forward_task(const Arguments& a, const Grid& g, int64_t item, int64_t split, int64_t first,
                  int64_t last, float* end, float* sum_step) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state;
  const int64_t row = g.items * state_size(a);
  const int64_t from = split * g.blocks_per_split;
  const int64_t to = from + g.blocks_per_split < g.blocks ? from + g.blocks_per_split : g.blocks;
  vec step[TILE], u[TILE], input[TILE], y[TILE], h[NB];
  for (int64_t block = from; block < to; ++block) {
    const int lanes = block_lanes(a, block);
    const int64_t c = group * a.group_dim + block * W;  // channel
    for (int64_t tile = first; tile < last; ++tile) {
      const int count = tile_tokens(a, tile);
      const int64_t t = tile * TILE;
      const float* B = a.B + (item * a.length + t) * NP;
      const float* C = a.C + (item * a.length + t) * NP;
      Ahead<2, OUT> ahead;
      if (tile + 1 < last) {
        const View* views[] = {&a.delta, &a.u, &a.y};
        ahead.aim(views, b, c, t + TILE, lanes, tile_tokens(a, tile + 1));
      }
      make_steps<false>(a, b, c, t, lanes, count, step, nullptr);
      read_tile(a.u, b, c, t, lanes, count, u);
      vec skip = OUT && a.D ? load_some(a.D + c, lanes) : vec{};
      vec total = {};
      for (int i = 0; i < count; ++i) {
        input[i] = step[i] * u[i];
        y[i] = skip * u[i];
        total += step[i];
      }
      for (int64_t n0 = 0; n0 < NP; n0 += NB) {
        const float* A = a.A + (group * NP + n0) * a.group_dim + block * W;
        const int64_t offset = item * state_size(a) + n0 * a.group_dim + block * W;
        float* in = OUT ? a.starts + tile * row + offset : end + offset;
        float* out = OUT ? in + row : in;
        for (int n = 0; n < NB; ++n)
          h[n] = !OUT && tile == first ? vec{} : load_some(in + n * a.group_dim, lanes);
        forward_part<NB, OUT>(count, (int)NP, step, input, A, a.group_dim, B + n0, C + n0, lanes,
                              ahead, h, y);
        // The start of the next chunk is known already, and its task may be reading it.
        if (!OUT || tile + 1 < last || last == g.tiles)
          for (int n = 0; n < NB; ++n) store_some(out + n * a.group_dim, h[n], lanes);
      }
      if (OUT) {
        write_tile(a.y, b, c, t, lanes, count, y);
      } else {
        float* p = sum_step + item * a.group_dim + block * W;
        store_some(p, tile == first ? total : load_some(p, lanes) + total, lanes);
      }
    }
  }
}

// carry[n][h] = exp(A[n][h] * sum_step[h]) * carry[n][h] + end[n][h]
void combine(const Arguments& a, int64_t item, const float* sum_step, const float* end,
             const float* in, float* out) {
  const float* A = a.A + (item % a.groups) * state_size(a);
  for (int64_t n = 0; n < a.padded_state; ++n)
    for (int64_t h = 0; h < a.group_dim; h += W) {
      const int lanes = block_lanes(a, h / W);
      const int64_t i = n * a.group_dim + h, j = item * state_size(a) + i;
      vec decay = exp2_(load_some(A + i, lanes) * load_some(sum_step + item * a.group_dim + h, lanes) *
                        LOG2E);
      vec x = decay * load_some(in + j, lanes) + load_some(end + j, lanes);
      store_some(out + j, x, lanes);
    }
}

template <int NB> void forward(const Arguments& a) {
  const Grid g(a);
  const int64_t row = g.items * state_size(a);
  std::memset(a.starts, 0, row * sizeof(float));
  if (g.chunks > 1) {
    std::vector<float> ends((g.chunks - 1) * row), sums((g.chunks - 1) * g.items * a.group_dim);
    parallel(g.items * g.splits * (g.chunks - 1), a.threads, [&](int64_t i) {
      const int64_t chunk = i % (g.chunks - 1), split = i / (g.chunks - 1) % g.splits;
      const int64_t first = chunk * g.tiles_per_chunk;
      forward_task<NB, false>(a, g, i / (g.chunks - 1) / g.splits, split, first,
                              first + g.tiles_per_chunk, &ends[chunk * row],
                              &sums[chunk * g.items * a.group_dim]);
    });
    parallel(g.items, a.threads, [&](int64_t item) {
      for (int64_t chunk = 0; chunk + 1 < g.chunks; ++chunk) {
        float* from = a.starts + chunk * g.tiles_per_chunk * row;
        combine(a, item, &sums[chunk * g.items * a.group_dim], &ends[chunk * row], from,
                from + g.tiles_per_chunk * row);
      }
    });
  }
  parallel(g.tasks(), a.threads, [&](int64_t i) {
    const int64_t chunk = i % g.chunks, split = i / g.chunks % g.splits;
    const int64_t first = chunk * g.tiles_per_chunk;
    const int64_t last = first + g.tiles_per_chunk;
    forward_task<NB, true>(a, g, i / g.chunks / g.splits, split, first,
                           last < g.tiles ? last : g.tiles, nullptr, nullptr);
  });
}

// Backward ---------------------------------------------------------------------------------------

// What one task needs besides its tile: sums over its channel blocks.
struct Scratch {
  std::vector<char> memory;
  vec *decay, *state, *sum_B, *sum_C;  // [TILE][NB], [TILE + 1][NB], [TILE][NP] twice
  Scratch(int NB, int64_t NP) : memory(sizeof(vec) * (TILE * (2 * NB + 2 * NP) + NB) + 64) {
    auto p = (vec*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    decay = p;
    state = decay + TILE * NB;
    sum_B = state + (TILE + 1) * NB;
    sum_C = sum_B + TILE * NP;
  }
};

// One part of NB states over one tile, from its last token to its first. g[n] is the adjoint that
// comes in from the right, already times the decay of the token there.
template <int NB>
void backward_part(int count, int NP, const vec* step, const vec* input, const vec* grad_y,
                   const float* A, int64_t lda, const float* B, const float* C, int lanes,
                   Scratch& s, int n0, const Ahead<3, 2>& ahead, vec* g_io, vec* grad_A,
                   vec* grad_input, vec* grad_step) {
  vec rate[NB], g[NB], dA[NB];
  for (int n = 0; n < NB; ++n) rate[n] = load_some(A + n * lda, lanes);
  {
    vec h[NB];
    for (int n = 0; n < NB; ++n) h[n] = s.state[n];
    for (int i = 0; i < count; ++i) {
      vec d = step[i] * LOG2E, x = input[i];
      ahead.fetch(i);
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) {
        vec decay = exp2_(d * rate[n]);
        h[n] = decay * h[n] + x * B[i * NP + n];
        s.decay[i * NB + n] = decay;
        s.state[(i + 1) * NB + n] = h[n];
      }
    }
  }
  for (int n = 0; n < NB; ++n) {
    g[n] = g_io[n];
    dA[n] = grad_A[n];
  }
  for (int i = count - 1; i >= 0; --i) {
    const vec dy = grad_y[i], d = step[i], x = input[i];
    vec to_input = {}, to_step = {};
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      s.sum_C[i * NP + n0 + n] += s.state[(i + 1) * NB + n] * dy;
      vec adjoint = dy * C[i * NP + n] + g[n];
      s.sum_B[i * NP + n0 + n] += adjoint * x;
      to_input += adjoint * B[i * NP + n];
      g[n] = adjoint * s.decay[i * NB + n];
      vec w = g[n] * s.state[i * NB + n];
      to_step += w * rate[n];
      dA[n] += w * d;
    }
    grad_input[i] += to_input;
    grad_step[i] += to_step;
  }
  for (int n = 0; n < NB; ++n) {
    g_io[n] = g[n];
    grad_A[n] = dA[n];
  }
}

// Only the adjoint, for finding what a chunk passes to the one on its left.
template <int NB>
void adjoint_part(int count, int NP, const vec* step, const vec* grad_y, const float* A,
                  int64_t lda, const float* C, int lanes, vec* g) {
  vec rate[NB];
  for (int n = 0; n < NB; ++n) rate[n] = load_some(A + n * lda, lanes) * LOG2E;
  for (int i = count - 1; i >= 0; --i)
    for (int n = 0; n < NB; ++n)
      g[n] = exp2_(step[i] * rate[n]) * (grad_y[i] * C[i * NP + n] + g[n]);
}

// Sums over tokens are taken per tile first: one long sum would lose digits.
inline void add_some(float* p, vec x, int lanes, bool first) {
  store_some(p, first ? x : load_some(p, lanes) + x, lanes);
}

// Sums of a chunk's task that the caller adds up over chunks, laid out as one row of starts / D.
struct Sums {
  float *A, *D, *bias;
};

template <int NB>
void adjoint_task(const Arguments& a, const Grid& g, int64_t item, int64_t split, int64_t first,
                  int64_t last, float* end, float* sum_step) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state;
  const int64_t from = split * g.blocks_per_split;
  const int64_t to = from + g.blocks_per_split < g.blocks ? from + g.blocks_per_split : g.blocks;
  vec step[TILE], grad_y[TILE], adjoint[NB];
  for (int64_t tile = last - 1; tile >= first; --tile) {
    const int count = tile_tokens(a, tile);
    const int64_t t = tile * TILE;
    const float* C = a.C + (item * a.length + t) * NP;
    for (int64_t block = from; block < to; ++block) {
      const int lanes = block_lanes(a, block);
      const int64_t c = group * a.group_dim + block * W;
      make_steps<false>(a, b, c, t, lanes, count, step, nullptr);
      read_tile(a.grad_y, b, c, t, lanes, count, grad_y);
      vec total = {};
      for (int i = 0; i < count; ++i) total += step[i];
      float* p = sum_step + item * a.group_dim + block * W;
      store_some(p, tile == last - 1 ? total : load_some(p, lanes) + total, lanes);
      for (int64_t n0 = 0; n0 < NP; n0 += NB) {
        const float* A = a.A + (group * NP + n0) * a.group_dim + block * W;
        float* g_io = end + item * state_size(a) + n0 * a.group_dim + block * W;
        for (int n = 0; n < NB; ++n)
          adjoint[n] = tile == last - 1 ? vec{} : load_some(g_io + n * a.group_dim, lanes);
        adjoint_part<NB>(count, (int)NP, step, grad_y, A, a.group_dim, C + n0, lanes, adjoint);
        for (int n = 0; n < NB; ++n) store_some(g_io + n * a.group_dim, adjoint[n], lanes);
      }
    }
  }
}

// `adjoint` (one row of starts) comes in from the right and is left as it goes out to the left.
template <int NB>
void backward_task(const Arguments& a, const Grid& g, int64_t item, int64_t split, int64_t first,
                   int64_t last, float* adjoint, Sums sums, float* grad_B, float* grad_C) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state;
  const int64_t row = g.items * state_size(a);
  const int64_t from = split * g.blocks_per_split;
  const int64_t to = from + g.blocks_per_split < g.blocks ? from + g.blocks_per_split : g.blocks;
  Scratch s(NB, NP);
  vec step[TILE], slope[TILE], u[TILE], input[TILE], grad_y[TILE];
  vec grad_input[TILE], grad_step[TILE], h[NB], dA[NB];
  for (int64_t tile = last - 1; tile >= first; --tile) {
    const int count = tile_tokens(a, tile);
    const int64_t t = tile * TILE, bc = (item * a.length + t) * NP;
    std::memset((void*)s.sum_B, 0, 2 * TILE * NP * sizeof(vec));
    for (int64_t block = from; block < to; ++block) {
      const int lanes = block_lanes(a, block);
      const int64_t c = group * a.group_dim + block * W;
      // Next come the following block, or the first block of the tile on the left.
      Ahead<3, 2> ahead;
      const int64_t next_tile = block + 1 < to ? tile : tile - 1;
      if (next_tile >= first) {
        const int64_t next = block + 1 < to ? block + 1 : from;
        const int64_t c1 = group * a.group_dim + next * W, t1 = next_tile * TILE;
        const int lanes1 = block_lanes(a, next), count1 = tile_tokens(a, next_tile);
        const View* views[] = {&a.delta, &a.u, &a.grad_y, &a.grad_u, &a.grad_delta};
        ahead.aim(views, b, c1, t1, lanes1, count1);
      }
      make_steps<true>(a, b, c, t, lanes, count, step, slope);
      read_tile(a.u, b, c, t, lanes, count, u);
      read_tile(a.grad_y, b, c, t, lanes, count, grad_y);
      for (int i = 0; i < count; ++i) {
        input[i] = step[i] * u[i];
        grad_input[i] = grad_step[i] = vec{};
      }
      for (int64_t n0 = 0; n0 < NP; n0 += NB) {
        const int64_t offset = item * state_size(a) + n0 * a.group_dim + block * W;
        const float* A = a.A + (group * NP + n0) * a.group_dim + block * W;
        for (int n = 0; n < NB; ++n) {
          s.state[n] = load_some(a.starts + tile * row + offset + n * a.group_dim, lanes);
          h[n] = load_some(adjoint + offset + n * a.group_dim, lanes);
          dA[n] = vec{};
        }
        backward_part<NB>(count, (int)NP, step, input, grad_y, A, a.group_dim, a.B + bc + n0,
                          a.C + bc + n0, lanes, s, (int)n0, ahead, h, dA, grad_input,
                          grad_step);
        for (int n = 0; n < NB; ++n) {
          store_some(adjoint + offset + n * a.group_dim, h[n], lanes);
          add_some(sums.A + offset + n * a.group_dim, dA[n], lanes, tile == last - 1);
        }
      }
      const int64_t i_c = b * a.groups * a.group_dim + c;
      vec skip = a.D ? load_some(a.D + c, lanes) : vec{};
      vec dD = {}, dbias = {};
      for (int i = 0; i < count; ++i) {
        grad_step[i] = (grad_step[i] + grad_input[i] * u[i]) * slope[i];
        grad_input[i] = grad_input[i] * step[i] + skip * grad_y[i];
        dD += grad_y[i] * u[i];
        dbias += grad_step[i];
      }
      add_some(sums.D + i_c, dD, lanes, tile == last - 1);
      add_some(sums.bias + i_c, dbias, lanes, tile == last - 1);
      write_tile(a.grad_u, b, c, t, lanes, count, grad_input);
      write_tile(a.grad_delta, b, c, t, lanes, count, grad_step);
    }
    // Sums over lanes, W vectors at a time.
    for (int which = 0; which < 2; ++which) {
      const vec* sum = which ? s.sum_C : s.sum_B;
      float* out = (which ? grad_C : grad_B) + bc;
      const int64_t total = count * NP;
      for (int64_t i = 0; i < total; i += W) {
        const int some = (int)(total - i < W ? total - i : W);
        vec rows[W];
        for (int j = 0; j < W; ++j) rows[j] = j < some ? sum[i + j] : vec{};
        store_some(out + i, lane_sums(rows), some);
      }
    }
  }
}

void add_rows(float* out, const float* rows, int64_t count, int64_t size, int64_t threads) {
  const int64_t piece = 4096;
  parallel(ceil_div(size, piece), threads, [&](int64_t k) {
    const int64_t end = (k + 1) * piece < size ? (k + 1) * piece : size;
    for (int64_t i = k * piece; i < end; ++i) {
      float x = rows[i];
      for (int64_t r = 1; r < count; ++r) x += rows[r * size + i];
      out[i] = x;
    }
  });
}

template <int NB> void backward(const Arguments& a) {
  const Grid g(a);
  const int64_t row = g.items * state_size(a), channels = g.items * a.group_dim;
  const int64_t tokens = g.items * a.length * a.padded_state;
  std::vector<float> adjoint(g.chunks * row);  // what comes into each chunk from the right
  float* from_right = &adjoint[(g.chunks - 1) * row];
  if (a.grad_last) std::memcpy(from_right, a.grad_last, row * sizeof(float));
  if (g.chunks > 1) {
    const int64_t rest = g.chunks - 1;
    std::vector<float> ends(rest * row), steps(rest * channels);
    parallel(g.items * g.splits * rest, a.threads, [&](int64_t i) {
      const int64_t chunk = i % rest + 1, split = i / rest % g.splits;
      const int64_t first = chunk * g.tiles_per_chunk, last = first + g.tiles_per_chunk;
      adjoint_task<NB>(a, g, i / rest / g.splits, split, first, last < g.tiles ? last : g.tiles,
                       &ends[(chunk - 1) * row], &steps[(chunk - 1) * channels]);
    });
    parallel(g.items, a.threads, [&](int64_t item) {
      for (int64_t chunk = g.chunks - 1; chunk > 0; --chunk)
        combine(a, item, &steps[(chunk - 1) * channels], &ends[(chunk - 1) * row],
                &adjoint[chunk * row], &adjoint[(chunk - 1) * row]);
    });
  }
  // Per-chunk and per-split partial sums, unless there is only one of them.
  std::vector<float> partial(g.chunks > 1 ? g.chunks * (row + 2 * channels) : 0);
  std::vector<float> partial_bc(g.splits > 1 ? 2 * g.splits * tokens : 0);
  float *dA = a.grad_A, *dD = a.grad_D, *dbias = a.grad_bias, *dB = a.grad_B, *dC = a.grad_C;
  if (g.chunks > 1) {
    dA = partial.data();
    dD = dA + g.chunks * row;
    dbias = dD + g.chunks * channels;
  }
  if (g.splits > 1) {
    dB = partial_bc.data();
    dC = dB + g.splits * tokens;
  }
  parallel(g.tasks(), a.threads, [&](int64_t i) {
    const int64_t chunk = i % g.chunks, split = i / g.chunks % g.splits;
    const int64_t first = chunk * g.tiles_per_chunk, last = first + g.tiles_per_chunk;
    Sums sums = {dA + chunk * row, dD + chunk * channels, dbias + chunk * channels};
    backward_task<NB>(a, g, i / g.chunks / g.splits, split, first, last < g.tiles ? last : g.tiles,
                      &adjoint[chunk * row], sums, dB + split * tokens, dC + split * tokens);
  });
  if (g.chunks > 1) {
    add_rows(a.grad_A, dA, g.chunks, row, a.threads);
    add_rows(a.grad_D, dD, g.chunks, channels, a.threads);
    add_rows(a.grad_bias, dbias, g.chunks, channels, a.threads);
  }
  if (g.splits > 1) {
    add_rows(a.grad_B, dB, g.splits, tokens, a.threads);
    add_rows(a.grad_C, dC, g.splits, tokens, a.threads);
  }
}

}  // namespace

extern "C" {

// Size of Arguments, so that a caller with another idea of it notices.
int64_t mmhybrid_scan_arguments(void) { return sizeof(Arguments); }
int64_t mmhybrid_scan_lanes(void) { return W; }

void mmhybrid_scan_forward(const Arguments* a) {
  switch (a->padded_state) {
    case 1: return forward<1>(*a);
    case 2: return forward<2>(*a);
    case 4: return forward<4>(*a);
    default: return forward<8>(*a);
  }
}

void mmhybrid_scan_backward(const Arguments* a) {
  switch (a->padded_state) {
    case 1: return backward<1>(*a);
    case 2: return backward<2>(*a);
    case 4: return backward<4>(*a);
    default: return backward<8>(*a);
  }
}
}
