// Attention without mask on a CPU, float32, forward only. No dependency but a C++17 compiler with
// vector extensions (g++, clang++); OpenMP where there is one.
//
// B batch, H heads, Q queries, K keys, D head width (a multiple of 8).
//
// A task is (item, head, range of queries). It packs keys into panels with keys over vector lanes,
// and values row after row; then blocks of QUERIES queries meet blocks of keys that stay in the
// nearest caches: products of ROWS queries with a block of keys, the largest of each row, powers of
// two (queries are scaled by log2(e) / sqrt(D) before), sums, and products with the values. Sums of
// earlier blocks are scaled down when a row finds a larger product. Results do not depend on the
// number or the timing of threads.
//
// Never compile this with -ffast-math: infinities and NaN must stay what they are.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#define ROWS 8
#elif defined(__AVX__)
#define W 8
#define ROWS 4
#else
#define W 4
#define ROWS 4
#endif
#define PANEL (3 * W)  // keys whose products with ROWS queries stay in registers
#define BLOCK (8 * PANEL)
#define QUERIES 64  // of a block

namespace {

typedef float vec __attribute__((vector_size(4 * W)));
typedef float half __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

template <typename V>
inline V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <typename V>
inline void store(float* p, V x) {
  std::memcpy(p, &x, sizeof x);
}

// 2^x for x <= 0; NaN stays NaN.
inline vec exp2_(vec x) {
#if defined(__AVX512F__)
  vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const float SHIFT = 12582912.f;  // 1.5 * 2^23: the whole part lands in the lowest bits
  const vec from = x;
  x = x < -126.f ? vec{} - 126.f : x;
  vec shifted = x + SHIFT, whole = shifted - SHIFT;
#endif
  vec f = x - whole;
  vec p = vec{} + 1.32647271e-3f;
  p = p * f + 9.67151286e-3f;
  p = p * f + 5.55073375e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return from == from ? (vec)((ivec)p + ((ivec)shifted << 23)) : from;
#endif
}

// Products of ROWS queries (D, ROWS) with panels of keys, (ROWS, BLOCK).
inline void products(const float* q, const float* keys, int64_t D, int panels, float* s) {
  for (int panel = 0; panel < panels; panel++, keys += D * PANEL, s += PANEL) {
    vec sum[ROWS][3] = {};
    for (int64_t d = 0; d < D; d++) {
      vec k[3];
      for (int i = 0; i < 3; i++) k[i] = load<vec>(keys + d * PANEL + i * W);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        vec one = q[d * ROWS + r] - vec{};
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) sum[r][i] += one * k[i];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++) store(s + r * BLOCK + i * W, sum[r][i]);
  }
}

// Adds the weighted values of FULL vectors of channels, and of 8 more, to sums (ROWS, D).
template <int FULL, bool MORE>
inline void weighted(const float* p, const float* values, int64_t D, int keys, float* out) {
  vec sum[ROWS][FULL ? FULL : 1];
  half rest[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
    for (int i = 0; i < FULL; i++) sum[r][i] = load<vec>(out + r * D + i * W);
    if (MORE) rest[r] = load<half>(out + r * D + FULL * W);
  }
  for (int key = 0; key < keys; key++, values += D) {
    vec v[FULL ? FULL : 1];
    half last = {};
    for (int i = 0; i < FULL; i++) v[i] = load<vec>(values + i * W);
    if (MORE) last = load<half>(values + FULL * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const float one = p[r * BLOCK + key];
#pragma GCC unroll 3
      for (int i = 0; i < FULL; i++) sum[r][i] += (one - vec{}) * v[i];
      if (MORE) rest[r] += (one - half{}) * last;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
    for (int i = 0; i < FULL; i++) store(out + r * D + i * W, sum[r][i]);
    if (MORE) store(out + r * D + FULL * W, rest[r]);
  }
}

inline void all_weighted(const float* p, const float* values, int64_t D, int keys, float* out) {
  int64_t d = 0;
  for (; D - d >= 3 * W; d += 3 * W)
    weighted<3, false>(p, values + d, D, keys, out + d);
  while (d < D) {
    const int64_t left = D - d;
    if (W == 4 || left % W == 0) {
      if (left >= 2 * W) weighted<2, false>(p, values + d, D, keys, out + d), d += 2 * W;
      else weighted<1, false>(p, values + d, D, keys, out + d), d += W;
    } else {
      if (left > 2 * W) weighted<2, true>(p, values + d, D, keys, out + d);
      else if (left > W) weighted<1, true>(p, values + d, D, keys, out + d);
      else weighted<0, true>(p, values + d, D, keys, out + d);
      d = D;
    }
  }
}

// Largest and sum of all lanes; what is compared with NaN gives the other.
inline float largest(vec x) {
  float t[W];
  store(t, x);
#pragma GCC unroll 4
  for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) t[i] = t[i] > t[i + n] ? t[i] : t[i + n];
  return t[0];
}
inline float total(vec x) {
  float t[W];
  store(t, x);
#pragma GCC unroll 4
  for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) t[i] += t[i + n];
  return t[0];
}

struct View {
  const float* data;
  int64_t batch, head, token;
};
struct Arguments {
  int64_t batch, heads, queries, keys, width, threads;
  View q, k, v;
  float* out;  // (batch, queries, heads, width)
};

struct Room {
  float* data;
  explicit Room(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {}
  ~Room() { std::free(data); }
};

void one(const Arguments& a, int64_t b, int64_t h, int64_t first, int64_t end) {
  const int64_t D = a.width, K = a.keys, panels = (K + PANEL - 1) / PANEL;
  Room keys(panels * PANEL * D), values(K * D), scores(ROWS * BLOCK), sums(QUERIES * D),
      query(QUERIES * D);
  const float* k = a.k.data + b * a.k.batch + h * a.k.head;
  const float* v = a.v.data + b * a.v.batch + h * a.v.head;
  for (int64_t j = 0; j < panels * PANEL; j++) {
    float* to = keys.data + j / PANEL * PANEL * D + j % PANEL;
    for (int64_t d = 0; d < D; d++) to[d * PANEL] = j < K ? k[j * a.k.token + d] : 0.f;
  }
  for (int64_t j = 0; j < K; j++) std::memcpy(values.data + j * D, v + j * a.v.token, 4 * D);
  const float scale = 1.44269504088896340736f / __builtin_sqrtf(float(D));
  const float infinity = std::numeric_limits<float>::infinity();
  float top[QUERIES], sum[QUERIES];

  for (int64_t at = first; at < end; at += QUERIES) {
    const int64_t count = end - at < QUERIES ? end - at : QUERIES;
    const int64_t tiles = (count + ROWS - 1) / ROWS;
    const float* q = a.q.data + b * a.q.batch + h * a.q.head + at * a.q.token;
    for (int64_t i = 0; i < tiles * ROWS; i++) {
      float* to = query.data + i / ROWS * ROWS * D + i % ROWS;
      for (int64_t d = 0; d < D; d++) to[d * ROWS] = i < count ? q[i * a.q.token + d] * scale : 0.f;
      top[i] = -infinity;
      sum[i] = 0;
    }
    std::memset(sums.data, 0, 4 * tiles * ROWS * D);
    for (int64_t from = 0; from < K; from += BLOCK) {
      const int number = int(K - from < BLOCK ? K - from : BLOCK);
      const int blocks = (number + PANEL - 1) / PANEL;
      for (int64_t t = 0; t < tiles; t++) {
        float* s = scores.data;
        products(query.data + t * ROWS * D, keys.data + from * D, D, blocks, s);
        float* out = sums.data + t * ROWS * D;
        for (int r = 0; r < ROWS; r++, s += BLOCK) {
          for (int j = number; j < blocks * PANEL; j++) s[j] = -infinity;
          vec m = load<vec>(s);
          for (int j = W; j < blocks * PANEL; j += W) {
            vec x = load<vec>(s + j);
            m = x > m ? x : m;
          }
          float& before = top[t * ROWS + r];
          const float now = largest(m), larger = now > before ? now : before;
          const float base = larger == -infinity ? 0.f : larger;
          vec part = {};
          for (int j = 0; j < blocks * PANEL; j += W) {
            vec e = exp2_(load<vec>(s + j) - base);
            store(s + j, e);
            part += e;
          }
          float& whole = sum[t * ROWS + r];
          if (larger > before) {
            const float less = before == -infinity ? 0.f : exp2_(before - larger - vec{})[0];
            whole *= less;
            for (int64_t d = 0; d < D; d++) out[r * D + d] *= less;
            before = larger;
          }
          whole += total(part);
        }
        all_weighted(scores.data, values.data + from * D, D, number, out);
      }
    }
    for (int64_t i = 0; i < count; i++) {
      float* to = a.out + ((b * a.queries + at + i) * a.heads + h) * D;
      const float inverse = 1.f / sum[i];
      for (int64_t d = 0; d < D; d++) to[d] = sums.data[i * D + d] * inverse;
    }
  }
}

}  // namespace

extern "C" {

int64_t mmhybrid_attention_arguments() { return sizeof(Arguments); }

// Floats of a vector; with fewer than 8 PyTorch's own attention is faster.
int64_t mmhybrid_attention_lanes() { return W; }

void mmhybrid_attention(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int64_t heads = a.batch * a.heads, blocks = (a.queries + QUERIES - 1) / QUERIES;
  int64_t parts = heads % a.threads == 0 ? 1 : (4 * a.threads + heads - 1) / heads;
  if (parts > blocks) parts = blocks;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(int(a.threads))
#endif
  for (int64_t task = 0; task < heads * parts; task++) {
    const int64_t head = task / parts, part = task % parts;
    const int64_t from = blocks * part / parts * QUERIES, to = blocks * (part + 1) / parts * QUERIES;
    one(a, head / a.heads, head % a.heads, from, to < a.queries ? to : a.queries);
  }
}

}  // extern "C"
