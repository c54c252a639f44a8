// The selective scan on a CPU, float32: forward and backward. README.md beside this file has the
// mathematics; cpp.py builds and calls this. No dependency but a C++17 compiler with vector
// extensions (g++, clang++); OpenMP where there is one.
//
// B batch, G groups, H channels per group, L tokens, N state; NP is N padded to whole parts.
//
// Channels lie over vector lanes, the states of a part stay in registers, tokens follow each other.
// Tokens are taken in tiles of TILE: where a channel's tokens are neighbours in memory they are
// transposed into lanes tile by tile, where a token's channels are they are loaded as they lie, at
// places that a table may name. The state at each tile's start is kept for the backward pass, which
// computes a tile's states again and then walks the tile from its end. A task is (item, group,
// range of channel blocks, chunk of tiles); chunks are used when the others are fewer than the
// threads, at the price of a second sweep. Groups that share an input or add up in one output are
// taken one after the other. Sums over channels (for the gradients of B and C) go through per-task
// buffers that are added in a fixed order: results do not depend on the timing of threads.
//
// Never compile this with -ffast-math: it removes the rounding by adding and subtracting SHIFT.

#include <atomic>
#include <cmath>
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
  if (lanes == W) return load(p);
  vec x = {};
  for (int i = 0; i < lanes; ++i) x[i] = p[i];
  return x;
}
inline void store_some(float* p, vec x, int lanes) {
  if (lanes == W) return store(p, x);
  for (int i = 0; i < lanes; ++i) p[i] = x[i];
}
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

// A (batch, group, channel, token) tensor.
struct View {
  float* data;
  int64_t batch, group, channel, token;
  float* at(int64_t b, int64_t g, int64_t c, int64_t t) const {
    return data + b * batch + g * group + c * channel + t * token;
  }
};

// A (batch, group, token) tensor of rows whose values are neighbours.
struct Rows {
  float* data;
  int64_t batch, group, token;
  float* at(int64_t b, int64_t g, int64_t t) const {
    return data + b * batch + g * group + t * token;
  }
};

// The tokens of one tile, in scan order; -1 is a token of zeros, which is never written.
struct Tile {
  int count;
  int along;  // 1 or -1 for neighbours in this sense, 0 for places that a table names
  int64_t token[TILE];
};

// `count` tokens of `lanes` channels into out[token][lane]; the other lanes become 0.
void read_tile(const View& x, int64_t b, int64_t g, int64_t c, const Tile& tile, int lanes,
               vec* out) {
  int i = 0;
  if (x.channel == 1 && lanes == W) {
    const float* p = x.at(b, g, c, 0);
    for (; i < tile.count; ++i)
      out[i] = tile.token[i] < 0 ? vec{} : load(p + tile.token[i] * x.token);
  } else if (x.token == 1 && tile.along) {
    for (; i + W <= tile.count; i += W) {
      vec rows[W];
      const float* p = x.at(b, g, c, tile.token[tile.along > 0 ? i : i + W - 1]);
      for (int j = 0; j < W; ++j) rows[j] = j < lanes ? load(p + j * x.channel) : vec{};
      transpose(rows);
      for (int j = 0; j < W; ++j) out[i + j] = rows[tile.along > 0 ? j : W - 1 - j];
    }
  }
  for (; i < tile.count; ++i) {
    vec row = {};
    const float* p = x.at(b, g, c, tile.token[i]);
    if (tile.token[i] >= 0)
      for (int j = 0; j < lanes; ++j) row[j] = p[j * x.channel];
    out[i] = row;
  }
}

// With `add` the values are added to what is there.
void write_tile(const View& x, int64_t b, int64_t g, int64_t c, const Tile& tile, int lanes,
                bool add, const vec* in) {
  int i = 0;
  if (x.channel == 1 && lanes == W) {
    float* first = x.at(b, g, c, 0);
    for (; i < tile.count; ++i) {
      float* p = first + tile.token[i] * x.token;
      if (tile.token[i] >= 0) store(p, add ? load(p) + in[i] : in[i]);
    }
  } else if (x.token == 1 && tile.along) {
    for (; i + W <= tile.count; i += W) {
      vec rows[W];
      for (int j = 0; j < W; ++j) rows[j] = in[i + (tile.along > 0 ? j : W - 1 - j)];
      transpose(rows);
      float* first = x.at(b, g, c, tile.token[tile.along > 0 ? i : i + W - 1]);
      for (int j = 0; j < lanes; ++j) {
        float* p = first + j * x.channel;
        store(p, add ? load(p) + rows[j] : rows[j]);
      }
    }
  }
  for (; i < tile.count; ++i) {
    float* p = x.at(b, g, c, tile.token[i]);
    if (tile.token[i] >= 0)
      for (int j = 0; j < lanes; ++j) p[j * x.channel] = in[i][j] + (add ? p[j * x.channel] : 0.f);
  }
}

// Asks for the tile that comes next, a line per view and token while this one is computed: its
// lines lie far from each other, in too many streams for the processor to foresee, and all requests
// at once would fill its queue and stop it.
template <int READS, int WRITES> struct Ahead {
  const float* line[READS + WRITES][TILE];
  int lines = 0;  // per view
  // Views in the order of READS, then WRITES, absent ones null; channels from c.
  void aim(const View* const* views, int64_t b, int64_t g, int64_t c, const Tile& next,
           int lanes) {
    lines = next.count;
    for (int k = 0; k < READS + WRITES; ++k) {
      const View& x = *views[k];
      if (x.token == 1 && next.along) {  // a channel after the other
        const float* p = x.at(b, g, c, next.token[next.along > 0 ? 0 : lines - 1]);
        for (int i = 0; i < lines; ++i)
          line[k][i] = i < lanes * LINES ? p + i / LINES * x.channel + i % LINES * LINE : p;
      } else {
        const float* p = x.data ? x.at(b, g, c, 0) : nullptr;
        for (int i = 0; i < lines; ++i) line[k][i] = p + next.token[i] * x.token;
      }
    }
  }
  // (Always inline: else g++ takes it for a function without effect.)
  __attribute__((always_inline)) void fetch(int i) const {
    if (i >= lines) return;
    for (int k = 0; k < READS + WRITES; ++k)
      if (k < READS)
        __builtin_prefetch(line[k][i], 0);
      else
        __builtin_prefetch(line[k][i], 1);
  }
};

}  // namespace

extern "C" {

// Filled by cpp.py; every member is 8 bytes. Absent tensors are null.
struct Arguments {
  int64_t batch, groups, group_dim, length, tokens, padded_state, rank, softplus, threads;
  int64_t reverse;          // without a table: from the last token to the first
  int64_t shared, merged;   // all groups have one u; y is the sum over groups
  const int32_t* order;     // (G, length): the token at each position, -1 for zeros; or null
  int64_t order_stride;     // from group to group
  View u, delta, y;         // delta is null with a rank; y: output
  Rows B, C, low;           // of NP values twice; of `rank` values, from which delta is made
  const float* weight;      // (G, rank, H), makes delta
  const float *A, *D, *bias;  // (G, NP, H), (G * H) or null twice
  float *starts, *last;     // (tiles, B, G, NP, H): state before each tile, or null; and at the end
  // Backward only:
  View grad_y, grad_u, grad_delta;
  const float* grad_last;   // (B, G, NP, H) or null
  float *grad_A;            // (B, G, NP, H), to be summed over B
  float *grad_B, *grad_C;   // (B, G, tokens, NP)
  float *grad_D, *grad_bias;  // (B, G * H), to be summed over B
};
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut into tasks. `together`: one task takes all groups of an item.
struct Grid {
  int64_t tiles, blocks, splits, blocks_per_split, chunks, tiles_per_chunk, items;
  bool together;
  Grid(const Arguments& a, bool together) : together(together) {
    tiles = ceil_div(a.length, TILE);
    blocks = ceil_div(a.group_dim, W);
    items = a.batch * a.groups;
    const int64_t units = together ? a.batch : items;
    splits = units >= a.threads ? 1 : ceil_div(a.threads, units);
    splits = splits < blocks ? splits : blocks;
    blocks_per_split = ceil_div(blocks, splits);
    splits = ceil_div(blocks, blocks_per_split);
    chunks = ceil_div(a.threads, units * splits);
    if (chunks < 3) chunks = 1;  // two chunks do twice the work with twice the threads
    chunks = chunks < tiles ? chunks : tiles;
    tiles_per_chunk = ceil_div(tiles, chunks);
    chunks = ceil_div(tiles, tiles_per_chunk);
  }
};

// A range of channel blocks and one of tiles.
struct Range {
  int64_t chunk, from, to, first, last;
  Range(const Grid& g, int64_t split, int64_t chunk) : chunk(chunk) {
    from = split * g.blocks_per_split;
    to = from + g.blocks_per_split < g.blocks ? from + g.blocks_per_split : g.blocks;
    first = chunk * g.tiles_per_chunk;
    last = first + g.tiles_per_chunk < g.tiles ? first + g.tiles_per_chunk : g.tiles;
  }
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

// Run task(item, split, chunk) for all chunks from `chunk0` to before `chunk1`. Groups that write
// to the same places follow each other: in one task, or where chunks of several groups could meet
// at a token, one group after the other.
template <class Task>
void for_all(const Arguments& a, const Grid& g, int64_t chunk0, int64_t chunk1, Task task) {
  const int64_t chunks = chunk1 - chunk0;
  if (!g.together) {
    parallel(g.items * g.splits * chunks, a.threads, [&](int64_t i) {
      task(i / chunks / g.splits, i / chunks % g.splits, chunk0 + i % chunks);
    });
    return;
  }
  const int64_t rounds = chunks > 1 ? a.groups : 1, groups = chunks > 1 ? 1 : a.groups;
  for (int64_t round = 0; round < rounds; ++round)
    parallel(a.batch * g.splits * chunks, a.threads, [&](int64_t i) {
      for (int64_t group = round; group < round + groups; ++group)
        task(i / chunks / g.splits * a.groups + group, i / chunks % g.splits, chunk0 + i % chunks);
    });
}

int block_lanes(const Arguments& a, int64_t block) {
  int64_t left = a.group_dim - block * W;
  return (int)(left < W ? left : W);
}
int64_t state_size(const Arguments& a) { return a.padded_state * a.group_dim; }  // per item

void find_tokens(const Arguments& a, int64_t group, int64_t tile, Tile& out) {
  const int64_t t = tile * TILE, left = a.length - t;
  out.count = (int)(left < TILE ? left : TILE);
  out.along = a.order ? 0 : a.reverse ? -1 : 1;
  for (int i = 0; i < out.count; ++i)
    out.token[i] = a.order     ? a.order[group * a.order_stride + t + i]
                   : a.reverse ? a.length - 1 - t - i
                               : t + i;
}

// Memory of a task, aligned to lines.
struct Room {
  std::vector<char> memory;
  char* next;
  Room(int64_t vecs) : memory(vecs * sizeof(vec) + 64, 0) {
    next = (char*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
  }
  vec* take(int64_t vecs) {
    auto p = (vec*)next;
    next += vecs * sizeof(vec);
    return p;
  }
};

// The rows of a tile's tokens; TILE of them, those after the last token of zeros.
void find_rows(const Rows& x, int64_t b, int64_t g, const Tile& tile, const float* zeros,
               const float** rows) {
  for (int i = 0; i < TILE; ++i)
    rows[i] = i < tile.count && tile.token[i] >= 0 ? x.at(b, g, tile.token[i]) : zeros;
}

// A vector's worth of zeros for any row.
int64_t zero_vecs(const Arguments& a) {
  return ceil_div(a.padded_state > a.rank ? a.padded_state : a.rank, W);
}

// out[i] = sum_r weight[r] * rows[i][r], for whole groups of eight tokens.
void expand(const float* weight, int64_t stride, int64_t rank, const float* const* rows, int count,
            int lanes, vec* out) {
  for (int i = 0; i < count; i += 8) {
    vec sum[8] = {};
    for (int64_t r = 0; r < rank; ++r) {
      const vec w = load_some(weight + r * stride, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] += w * rows[i + j][r];
    }
    for (int j = 0; j < 8; ++j) out[i + j] = sum[j];
  }
}

// Step of one tile, and with SLOPE its derivative.
template <bool SLOPE>
void make_steps(const Arguments& a, int64_t b, int64_t g, int64_t c, const Tile& tile, int lanes,
                const float* zeros, vec* step, vec* slope) {
  if (a.rank) {
    const float* rows[TILE];
    find_rows(a.low, b, g, tile, zeros, rows);
    expand(a.weight + g * a.rank * a.group_dim + c, a.group_dim, a.rank, rows, tile.count, lanes,
           step);
  } else {
    read_tile(a.delta, b, g, c, tile, lanes, step);
  }
  vec bias = a.bias ? load_some(a.bias + g * a.group_dim + c, lanes) : vec{};
  for (int i = 0; i < tile.count; ++i) {
    vec x = step[i] + bias, s = splat(1.f);
    if (a.softplus) softplus(x, x, s);
    step[i] = x;
    if (SLOPE) slope[i] = s;
  }
}

// Forward ----------------------------------------------------------------------------------------

// One part of NB states over one tile: h[n] in and out, y added to. B and C are rows, from n0.
// (A function of its own keeps the states in registers.)
template <int NB, bool OUT>
__attribute__((noinline)) void forward_part(int count, const vec* step, const vec* input, const float* A, int64_t lda,
                  const float* const* B, const float* const* C, int64_t n0, int lanes,
                  const Ahead<2, OUT>& ahead, vec* h_io, vec* y) {
  vec h[NB], rate[NB];
  for (int n = 0; n < NB; ++n) {
    h[n] = h_io[n];
    rate[n] = load_some(A + n * lda, lanes) * LOG2E;
  }
  for (int i = 0; i < count; ++i) {
    const float *b = B[i] + n0, *c = C[i] + n0;
    vec d = step[i], x = input[i], sum = {};
    ahead.fetch(i);
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      h[n] = exp2_(d * rate[n]) * h[n] + x * b[n];
      if (OUT) sum += h[n] * c[n];
    }
    if (OUT) y[i] += sum;
  }
  for (int n = 0; n < NB; ++n) h_io[n] = h[n];
}

// Sweep the tiles of a range. `start` is the state before it, null for zeros. With OUT y is
// written, and the states before the tiles if they are kept; without it the sum of the steps goes
// to `sum_step`. The state after the last tile goes to `end` if that is not null. States are laid
// out like one row of starts, sums like D per item.
template <int NB, bool OUT>
void forward_task(const Arguments& a, const Grid& g, int64_t item, const Range& range,
                  const float* start, float* end, float* sum_step) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state;
  const int64_t row = g.items * state_size(a), zeros_size = zero_vecs(a), H = a.group_dim;
  const int64_t blocks = range.to - range.from, count = range.last - range.first;
  const bool add = a.merged && group > 0;
  // Where the channels of a token are neighbours, all of a tile's come before the next tile, so
  // that rows are read once; else all tiles of a block before the next block.
  const bool by_tile = a.u.channel == 1 && a.y.channel == 1;
  Room room(blocks * (NP + 1) + zeros_size);
  vec *states = room.take(blocks * NP), *totals = room.take(blocks);
  auto zeros = (const float*)room.take(zeros_size);
  vec step[TILE], u[TILE], input[TILE], y[TILE];
  const float *B[TILE], *C[TILE];
  Tile tiles[2];
  for (int64_t i = 0; i < blocks * count; ++i) {
    const int64_t block = by_tile ? i % blocks : i / count;
    const int64_t t = range.first + (by_tile ? i / blocks : i % count);
    const int64_t c = (range.from + block) * W, at = item * state_size(a) + c;
    const int lanes = block_lanes(a, range.from + block);
    vec* state = states + block * NP;
    const Tile& tile = tiles[t % 2];
    if (t == range.first) {
      find_tokens(a, group, t, tiles[t % 2]);
      for (int64_t n = 0; start && n < NP; ++n) state[n] = load_some(start + at + n * H, lanes);
    }
    if (block == 0 || !by_tile) {
      if (t + 1 < range.last) find_tokens(a, group, t + 1, tiles[(t + 1) % 2]);
      find_rows(a.B, b, group, tile, zeros, B);
      find_rows(a.C, b, group, tile, zeros, C);
    }
    Ahead<2, OUT> ahead;
    if (t + 1 < range.last) {
      const View* views[] = {&a.delta, &a.u, &a.y};
      ahead.aim(views, b, group, c, tiles[(t + 1) % 2], lanes);
    }
    make_steps<false>(a, b, group, c, tile, lanes, zeros, step, nullptr);
    read_tile(a.u, b, group, c, tile, lanes, u);
    vec skip = OUT && a.D ? load_some(a.D + group * H + c, lanes) : vec{};
    vec total = {};
    for (int j = 0; j < tile.count; ++j) {
      input[j] = step[j] * u[j];
      y[j] = skip * u[j];
      total += step[j];
    }
    totals[block] += total;
    for (int64_t n0 = 0; n0 < NP; n0 += NB) {
      if (OUT && a.starts)
        for (int n = 0; n < NB; ++n)
          store_some(a.starts + t * row + at + (n0 + n) * H, state[n0 + n], lanes);
      forward_part<NB, OUT>(tile.count, step, input, a.A + (group * NP + n0) * H + c, H, B, C, n0,
                            lanes, ahead, state + n0, y);
    }
    if (OUT) write_tile(a.y, b, group, c, tile, lanes, add, y);
    if (t + 1 < range.last) continue;
    for (int64_t n = 0; end && n < NP; ++n) store_some(end + at + n * H, state[n], lanes);
    if (!OUT) store_some(sum_step + item * H + c, totals[block], lanes);
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
  const Grid g(a, a.merged);
  const int64_t row = g.items * state_size(a), channels = g.items * a.group_dim;
  std::vector<float> starts(g.chunks > 1 ? g.chunks * row : 0);  // of the chunks; of the first 0
  if (g.chunks > 1) {
    std::vector<float> ends((g.chunks - 1) * row), sums((g.chunks - 1) * channels);
    for_all(a, g, 0, g.chunks - 1, [&](int64_t item, int64_t split, int64_t chunk) {
      forward_task<NB, false>(a, g, item, Range(g, split, chunk), nullptr, &ends[chunk * row],
                              &sums[chunk * channels]);
    });
    parallel(g.items, a.threads, [&](int64_t item) {
      for (int64_t chunk = 0; chunk + 1 < g.chunks; ++chunk)
        combine(a, item, &sums[chunk * channels], &ends[chunk * row], &starts[chunk * row],
                &starts[(chunk + 1) * row]);
    });
  }
  for_all(a, g, 0, g.chunks, [&](int64_t item, int64_t split, int64_t chunk) {
    forward_task<NB, true>(a, g, item, Range(g, split, chunk), chunk ? &starts[chunk * row] : nullptr,
                           chunk + 1 == g.chunks ? a.last : nullptr, nullptr);
  });
}

// Backward ---------------------------------------------------------------------------------------

// What one task needs besides its tile: sums over its channel blocks.
struct Scratch {
  Room room;
  vec *decay, *state, *sum_B, *sum_C;  // [TILE][NB], [TILE + 1][NB], [TILE][NP] twice
  const float* zeros;
  Scratch(const Arguments& a, int NB)
      : room(TILE * (2 * NB + 2 * a.padded_state) + NB + zero_vecs(a)) {
    decay = room.take(TILE * NB);
    state = room.take((TILE + 1) * NB);
    sum_B = room.take(TILE * a.padded_state);
    sum_C = room.take(TILE * a.padded_state);
    zeros = (const float*)room.take(zero_vecs(a));
  }
};

// One part of NB states over one tile, from its last token to its first. g[n] is the adjoint that
// comes in from the right, already times the decay of the token there.
template <int NB>
__attribute__((noinline)) void backward_part(int count, int NP, const vec* step, const vec* input, const vec* grad_y,
                   const float* A, int64_t lda, const float* const* B, const float* const* C,
                   int lanes, Scratch& s, int n0, const Ahead<3, 2>& ahead, vec* g_io, vec* grad_A,
                   vec* grad_input, vec* grad_step) {
  vec rate[NB], g[NB], dA[NB];
  for (int n = 0; n < NB; ++n) rate[n] = load_some(A + n * lda, lanes);
  {
    vec h[NB];
    for (int n = 0; n < NB; ++n) h[n] = s.state[n];
    for (int i = 0; i < count; ++i) {
      const float* b = B[i] + n0;
      vec d = step[i] * LOG2E, x = input[i];
      ahead.fetch(i);
#pragma GCC unroll 8
      for (int n = 0; n < NB; ++n) {
        vec decay = exp2_(d * rate[n]);
        h[n] = decay * h[n] + x * b[n];
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
    const float *b = B[i] + n0, *c = C[i] + n0;
    const vec dy = grad_y[i], d = step[i], x = input[i];
    vec to_input = {}, to_step = {};
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n) {
      s.sum_C[i * NP + n0 + n] += s.state[(i + 1) * NB + n] * dy;
      vec adjoint = dy * c[n] + g[n];
      s.sum_B[i * NP + n0 + n] += adjoint * x;
      to_input += adjoint * b[n];
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
void adjoint_part(int count, const vec* step, const vec* grad_y, const float* A, int64_t lda,
                  const float* const* C, int64_t n0, int lanes, vec* g) {
  vec rate[NB];
  for (int n = 0; n < NB; ++n) rate[n] = load_some(A + n * lda, lanes) * LOG2E;
  for (int i = count - 1; i >= 0; --i)
    for (int n = 0; n < NB; ++n)
      g[n] = exp2_(step[i] * rate[n]) * (grad_y[i] * C[i][n0 + n] + g[n]);
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
void adjoint_task(const Arguments& a, int64_t item, const Range& range, float* end,
                  float* sum_step) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state, H = a.group_dim;
  Room room(NP + zero_vecs(a));
  vec* adjoint = room.take(NP);
  auto zeros = (const float*)room.take(zero_vecs(a));
  vec step[TILE], grad_y[TILE];
  const float* C[TILE];
  Tile tile;
  for (int64_t block = range.from; block < range.to; ++block) {
    const int lanes = block_lanes(a, block);
    const int64_t c = block * W;
    vec all = {};
    std::memset((void*)adjoint, 0, NP * sizeof(vec));
    for (int64_t t = range.last - 1; t >= range.first; --t) {
      find_tokens(a, group, t, tile);
      find_rows(a.C, b, group, tile, zeros, C);
      make_steps<false>(a, b, group, c, tile, lanes, zeros, step, nullptr);
      read_tile(a.grad_y, b, group, c, tile, lanes, grad_y);
      vec total = {};
      for (int i = 0; i < tile.count; ++i) total += step[i];
      all += total;
      for (int64_t n0 = 0; n0 < NP; n0 += NB)
        adjoint_part<NB>(tile.count, step, grad_y, a.A + (group * NP + n0) * H + c, H, C, n0, lanes,
                         adjoint + n0);
    }
    for (int64_t n = 0; n < NP; ++n)
      store_some(end + item * state_size(a) + n * H + c, adjoint[n], lanes);
    store_some(sum_step + item * H + c, all, lanes);
  }
}

// The rows of a tile are sums over lanes of `count` times NP vectors; `rows` is overwritten.
void write_rows(float* out, const Tile& tile, int64_t NP, vec* sums, std::vector<float>& rows) {
  const int64_t total = tile.count * NP;
  for (int64_t i = 0; i < total; i += W) {
    vec some[W];
    for (int j = 0; j < W; ++j) some[j] = i + j < total ? sums[i + j] : vec{};
    store_some(&rows[i], lane_sums(some), (int)(total - i < W ? total - i : W));
  }
  for (int i = 0; i < tile.count; ++i)
    if (tile.token[i] >= 0)
      std::memcpy(out + tile.token[i] * NP, &rows[i * NP], NP * sizeof(float));
}

// `adjoint` (one row of starts) comes in from the right and is left as it goes out to the left.
template <int NB>
void backward_task(const Arguments& a, const Grid& g, int64_t item, const Range& range,
                   float* adjoint, Sums sums, float* grad_B, float* grad_C) {
  const int64_t b = item / a.groups, group = item % a.groups, NP = a.padded_state, H = a.group_dim;
  const int64_t row = g.items * state_size(a);
  const bool add = a.shared && group > 0;
  Scratch s(a, NB);
  std::vector<float> rows(TILE * NP);
  vec step[TILE], slope[TILE], u[TILE], input[TILE], grad_y[TILE];
  vec grad_input[TILE], grad_step[TILE], h[NB], dA[NB];
  const float *B[TILE], *C[TILE];
  Tile tiles[2];
  find_tokens(a, group, range.last - 1, tiles[(range.last - 1) % 2]);
  for (int64_t t = range.last - 1; t >= range.first; --t) {
    const Tile& tile = tiles[t % 2];
    if (t > range.first) find_tokens(a, group, t - 1, tiles[(t - 1) % 2]);
    find_rows(a.B, b, group, tile, s.zeros, B);
    find_rows(a.C, b, group, tile, s.zeros, C);
    const bool last = t == range.last - 1;
    std::memset((void*)s.sum_B, 0, 2 * TILE * NP * sizeof(vec));
    for (int64_t block = range.from; block < range.to; ++block) {
      const int lanes = block_lanes(a, block);
      const int64_t c = block * W;
      // Next come the following block, or the first block of the tile on the left.
      Ahead<3, 2> ahead;
      const bool same = block + 1 < range.to;
      if (same || t > range.first) {
        const int64_t next = same ? block + 1 : range.from;
        const View* views[] = {&a.delta, &a.u, &a.grad_y, &a.grad_u, &a.grad_delta};
        ahead.aim(views, b, group, next * W, same ? tile : tiles[(t - 1) % 2],
                  block_lanes(a, next));
      }
      make_steps<true>(a, b, group, c, tile, lanes, s.zeros, step, slope);
      read_tile(a.u, b, group, c, tile, lanes, u);
      read_tile(a.grad_y, b, group, c, tile, lanes, grad_y);
      for (int i = 0; i < tile.count; ++i) {
        input[i] = step[i] * u[i];
        grad_input[i] = grad_step[i] = vec{};
      }
      for (int64_t n0 = 0; n0 < NP; n0 += NB) {
        const int64_t offset = item * state_size(a) + n0 * H + c;
        for (int n = 0; n < NB; ++n) {
          s.state[n] = load_some(a.starts + t * row + offset + n * H, lanes);
          h[n] = load_some(adjoint + offset + n * H, lanes);
          dA[n] = vec{};
        }
        backward_part<NB>(tile.count, (int)NP, step, input, grad_y,
                          a.A + (group * NP + n0) * H + c, H, B, C, lanes, s, (int)n0, ahead, h,
                          dA, grad_input, grad_step);
        for (int n = 0; n < NB; ++n) {
          store_some(adjoint + offset + n * H, h[n], lanes);
          add_some(sums.A + offset + n * H, dA[n], lanes, last);
        }
      }
      vec skip = a.D ? load_some(a.D + group * H + c, lanes) : vec{};
      vec dD = {}, dbias = {};
      for (int i = 0; i < tile.count; ++i) {
        grad_step[i] = (grad_step[i] + grad_input[i] * u[i]) * slope[i];
        grad_input[i] = grad_input[i] * step[i] + skip * grad_y[i];
        dD += grad_y[i] * u[i];
        dbias += grad_step[i];
      }
      add_some(sums.D + item * H + c, dD, lanes, last);
      add_some(sums.bias + item * H + c, dbias, lanes, last);
      write_tile(a.grad_u, b, group, c, tile, lanes, add, grad_input);
      write_tile(a.grad_delta, b, group, c, tile, lanes, false, grad_step);
    }
    write_rows(grad_B + item * a.tokens * NP, tile, NP, s.sum_B, rows);
    write_rows(grad_C + item * a.tokens * NP, tile, NP, s.sum_C, rows);
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
  const Grid g(a, a.shared);
  const int64_t row = g.items * state_size(a), channels = g.items * a.group_dim;
  const int64_t tokens = g.items * a.tokens * a.padded_state;
  std::vector<float> adjoint(g.chunks * row);  // what comes into each chunk from the right
  float* from_right = &adjoint[(g.chunks - 1) * row];
  if (a.grad_last) std::memcpy(from_right, a.grad_last, row * sizeof(float));
  if (g.chunks > 1) {
    const int64_t rest = g.chunks - 1;
    std::vector<float> ends(rest * row), steps(rest * channels);
    for_all(a, g, 1, g.chunks, [&](int64_t item, int64_t split, int64_t chunk) {
      adjoint_task<NB>(a, item, Range(g, split, chunk), &ends[(chunk - 1) * row],
                       &steps[(chunk - 1) * channels]);
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
  for_all(a, g, 0, g.chunks, [&](int64_t item, int64_t split, int64_t chunk) {
    Sums sums = {dA + chunk * row, dD + chunk * channels, dbias + chunk * channels};
    backward_task<NB>(a, g, item, Range(g, split, chunk), &adjoint[chunk * row], sums,
                      dB + split * tokens, dC + split * tokens);
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

// What attention over directions needs of their results: rows x of (B, L, K, D). A task takes some
// tokens, the same ones for any number of threads.

inline float sum_of_lanes(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0.f;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
#endif
}

// out[k][d]: the sum over tokens of what layer norm over the channels makes of x.
void normed_sum(const float* x, int64_t tokens, int64_t K, int64_t D, float eps, float* out) {
  const int64_t blocks = ceil_div(D, W), whole = D / W;
  const int rest = (int)(D % W);
  Room room((K + 1) * blocks);
  vec *sums = room.take(K * blocks), *row = room.take(blocks);
  for (int64_t i = 0; i < tokens * K; ++i, x += D) {
    vec s = {}, squares = {}, *sum = sums + i % K * blocks;
    for (int64_t j = 0; j < whole; ++j) s += row[j] = load(x + j * W);
    if (rest) s += row[whole] = load_some(x + whole * W, rest);
    const float mean = sum_of_lanes(s) / D;
    for (int64_t j = 0; j < blocks; ++j) row[j] -= mean;
    for (int j = rest; rest && j < W; ++j) row[whole][j] = 0.f;
    for (int64_t j = 0; j < blocks; ++j) squares += row[j] * row[j];
    const float scale = 1.f / std::sqrt(sum_of_lanes(squares) / D + eps);
    for (int64_t j = 0; j < blocks; ++j) sum[j] += row[j] * scale;
  }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t j = 0; j < blocks; ++j)
      store_some(out + k * D + j * W, sums[k * blocks + j], j < whole ? W : rest);
}

}  // namespace

extern "C" {

// out[b][k][d]: the mean over tokens of what layer norm over the channels makes of x.
void mmhybrid_normed_means(const float* x, int64_t batch, int64_t tokens, int64_t K, int64_t D,
                           float eps, float* out, int64_t threads) {
  const int64_t piece = 64, pieces = ceil_div(tokens, piece), row = K * D;
  std::vector<float> sums(batch * pieces * row);
  parallel(batch * pieces, threads, [&](int64_t i) {
    const int64_t t = i % pieces * piece, left = tokens - t;
    normed_sum(x + (i / pieces * tokens + t) * row, left < piece ? left : piece, K, D, eps,
               &sums[i * row]);
  });
  for (int64_t b = 0; b < batch; ++b) {
    add_rows(out + b * row, &sums[b * pieces * row], pieces, row, threads);
    for (int64_t i = 0; i < row; ++i) out[b * row + i] /= tokens;
  }
}

// out[b][l][d] = sum_k scale[b][k][d] * x[b][l][k][d]
void mmhybrid_scaled_sum(const float* x, const float* scale, int64_t batch, int64_t tokens,
                         int64_t K, int64_t D, float* out, int64_t threads) {
  const int64_t piece = 256;
  parallel(ceil_div(batch * tokens, piece), threads, [&](int64_t i) {
    const int64_t end = (i + 1) * piece < batch * tokens ? (i + 1) * piece : batch * tokens;
    for (int64_t t = i * piece; t < end; ++t) {
      const float *row = x + t * K * D, *by = scale + t / tokens * K * D;
      for (int64_t d = 0; d < D; ++d) {
        float sum = row[d] * by[d];
        for (int64_t k = 1; k < K; ++k) sum += row[k * D + d] * by[k * D + d];
        out[t * D + d] = sum;
      }
    }
  });
}

// Size of Arguments, so that a caller with another idea of it notices.
int64_t mmhybrid_scan_arguments(void) { return sizeof(Arguments); }
int64_t mmhybrid_scan_lanes(void) { return W; }

// Whether every entry of the table is a token, or -1.
int64_t mmhybrid_scan_order_fits(const int32_t* order, int64_t count, int64_t tokens) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= (order[i] < -1) | (order[i] >= tokens);
  return !wrong;
}

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
