// Kernels of scripts/fast_cpu.py, for one CPU thread and float32: causal attention of narrow heads,
// the cross-entropy of an output layer, and that of bf16 logits. They need GCC or Clang.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Bf16 __attribute__((vector_size(2 * LANES), aligned(2)));

const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// exp(x) for x < 88, with a relative error of about 2e-7 (the polynomial of Cephes' expf); exp(-87)
// below x = -87. NaN stays NaN.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  // The conversion rounds toward zero, hence a positive number first.
  Ints n = __builtin_convertvector(x * 1.44269504f + 128.5f, Ints) - 128;
  Vec whole = __builtin_convertvector(n, Vec);
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Vec)((n + 127) << 23);
}

inline float sum_of(Vec x) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}

inline float largest_of(Vec x) {
  float largest = x[0];
  for (int lane = 1; lane < LANES; ++lane) largest = std::max(largest, x[lane]);
  return largest;
}

struct Vectors {  // zeros at first
  int64_t size;
  std::unique_ptr<Vec[]> data;
  explicit Vectors(int64_t n = 0) : size(n), data(new Vec[n]()) {}
  Vec& operator[](int64_t i) { return data[i]; }
  Vec* at(int64_t i) { return data.get() + i; }
  float* floats() { return reinterpret_cast<float*>(data.get()); }
  void reserve(int64_t n) {
    if (n > size) data.reset(new Vec[size = n]);
  }
  void clear(int64_t n) { std::memset((void*)data.get(), 0, n * sizeof(Vec)); }
  // n numbers of each of up to 16 heads, one head a lane; unused lanes are zero.
  void load_heads(const float* from, int64_t heads, int64_t n) {
    if (heads < LANES) clear(n);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < n; ++i) floats()[i * LANES + h] = from[h * n + i];
  }
  void store_heads(float* to, int64_t heads, int64_t n) {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < n; ++i) to[h * n + i] = floats()[i * LANES + h];
  }
};

// What every attention kernel reads and writes. q, k, v, out and gradients: (G, T, C); the rest:
// (G, T). `lse` is the logarithm of the summed exponentials, `mean` the mean score. `d_entropy`,
// the gradient of the entropy lse - mean, may be null.
struct Attention {
  const float *q, *k, *v;
  float *out, *lse, *mean;
  const float *d_out, *d_entropy;
  float *dq, *dk, *dv;
  int64_t G, T;
};

// 16 heads of C channels at a time, one head a lane.
template <int C>
void forward(const Attention& a) {
  const int64_t T = a.T, size = T * C;
  Vectors q(size), k(size), v(size), out(size), lse(T), mean(T), scores(T);
  for (int64_t g = 0; g < a.G; g += LANES) {
    const int64_t heads = std::min<int64_t>(LANES, a.G - g);
    q.load_heads(a.q + g * size, heads, size);
    k.load_heads(a.k + g * size, heads, size);
    v.load_heads(a.v + g * size, heads, size);
    for (int64_t i = 0; i < T; ++i) {
      const Vec* qi = q.at(i * C);
      Vec highest = Vec{} - INFINITY;
      for (int64_t j = 0; j <= i; ++j) {
        const Vec* kj = k.at(j * C);
        Vec s = qi[0] * kj[0];
        for (int c = 1; c < C; ++c) s += qi[c] * kj[c];
        scores[j] = s;
        highest = s > highest ? s : highest;
      }
      Vec total{}, weighted{}, sums[C]{};
      for (int64_t j = 0; j <= i; ++j) {
        const Vec s = scores[j], weight = exponential(s - highest);
        total += weight;
        weighted += weight * s;
        for (int c = 0; c < C; ++c) sums[c] += weight * v[j * C + c];
      }
      for (int c = 0; c < C; ++c) out[i * C + c] = sums[c] / total;
      mean[i] = weighted / total;
      for (int lane = 0; lane < LANES; ++lane) lse[i][lane] = highest[lane] + std::log(total[lane]);
    }
    out.store_heads(a.out + g * size, heads, size);
    lse.store_heads(a.lse + g * T, heads, T);
    mean.store_heads(a.mean + g * T, heads, T);
  }
}

// With p a weight and s its score: d out / d s = p (v - out), d entropy / d s = -p (s - mean).
template <int C>
void backward(const Attention& a) {
  const int64_t T = a.T, size = T * C;
  Vectors q(size), k(size), v(size), out(size), d_out(size), dq(size), dk(size), dv(size);
  Vectors lse(T), mean(T), d_entropy(T);
  for (int64_t g = 0; g < a.G; g += LANES) {
    const int64_t heads = std::min<int64_t>(LANES, a.G - g);
    q.load_heads(a.q + g * size, heads, size);
    k.load_heads(a.k + g * size, heads, size);
    v.load_heads(a.v + g * size, heads, size);
    out.load_heads(a.out + g * size, heads, size);
    d_out.load_heads(a.d_out + g * size, heads, size);
    lse.load_heads(a.lse + g * T, heads, T);
    mean.load_heads(a.mean + g * T, heads, T);
    if (a.d_entropy) d_entropy.load_heads(a.d_entropy + g * T, heads, T);
    dk.clear(size);
    dv.clear(size);
    for (int64_t i = 0; i < T; ++i) {
      Vec qi[C], d_outi[C], dqi[C]{}, dot{};
      for (int c = 0; c < C; ++c) {
        qi[c] = q[i * C + c];
        d_outi[c] = d_out[i * C + c];
        dot += d_outi[c] * out[i * C + c];
      }
      const Vec de = d_entropy[i], constant = de * mean[i] - dot, total = lse[i];
      for (int64_t j = 0; j <= i; ++j) {
        const Vec *kj = k.at(j * C), *vj = v.at(j * C);
        Vec *dkj = dk.at(j * C), *dvj = dv.at(j * C);
        Vec s = qi[0] * kj[0], d_weight = d_outi[0] * vj[0];
        for (int c = 1; c < C; ++c) {
          s += qi[c] * kj[c];
          d_weight += d_outi[c] * vj[c];
        }
        const Vec below = s - total, weight = exponential(below > 0.0f ? Vec{} : below);
        const Vec ds = weight * (d_weight + constant - de * s);
        for (int c = 0; c < C; ++c) {
          dqi[c] += ds * kj[c];
          dkj[c] += ds * qi[c];
          dvj[c] += weight * d_outi[c];
        }
      }
      for (int c = 0; c < C; ++c) dq[i * C + c] = dqi[c];
    }
    dq.store_heads(a.dq + g * size, heads, size);
    dk.store_heads(a.dk + g * size, heads, size);
    dv.store_heads(a.dv + g * size, heads, size);
  }
}

// Heads of 16 channels, one after the other: a vector holds a token's channels, or one channel of
// 16 tokens.
struct Tokens {
  int64_t T, blocks;
  Vectors rows, columns;
  explicit Tokens(int64_t T) : T(T), blocks((T + 15) / 16), rows(T), columns(16 * blocks) {}
  void load(const float* from) {
    std::memcpy((void*)rows.at(0), from, T * sizeof(Vec));
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < 16; ++c) columns.floats()[c * 16 * blocks + t] = from[t * 16 + c];
  }
  // The inner products of the channels x with those of 16 tokens.
  Vec products(const float* x, int64_t block) {
    Vec even{}, odd{};
    for (int c = 0; c < 16; c += 2) {
      even += x[c] * columns[c * blocks + block];
      odd += x[c + 1] * columns[(c + 1) * blocks + block];
    }
    return even + odd;
  }
};

void forward_16(const Attention& a) {
  const int64_t T = a.T;
  Tokens k(T), v(T);
  Vectors weights(k.blocks);  // first the scores
  const float* p = weights.floats();
  for (int64_t g = 0; g < a.G; ++g) {
    k.load(a.k + g * T * 16);
    v.load(a.v + g * T * 16);
    for (int64_t i = 0; i < T; ++i) {
      const int64_t row = g * T + i;
      Vec highest = Vec{} - INFINITY, totals{}, weighted{}, sums[4]{};
      for (int64_t block = 0; block <= i / 16; ++block) {
        Vec s = k.products(a.q + row * 16, block);
        weights[block] = s;
        s = LANE + int32_t(16 * block) > int32_t(i) ? Vec{} - INFINITY : s;
        highest = s > highest ? s : highest;
      }
      const float top = largest_of(highest);
      for (int64_t block = 0; block <= i / 16; ++block) {
        const Vec s = weights[block], below = s - top;
        Vec weight = exponential(below > 0.0f ? Vec{} : below);
        const Ints later = LANE + int32_t(16 * block) > int32_t(i);
        weight = later ? Vec{} : weight;
        totals += weight;
        weighted += later ? Vec{} : weight * s;
        weights[block] = weight;
      }
      int64_t j = 0;
      for (; j + 4 <= i + 1; j += 4)  // four sums, as each addition waits for the last
        for (int n = 0; n < 4; ++n) sums[n] += p[j + n] * v.rows[j + n];
      for (; j <= i; ++j) sums[0] += p[j] * v.rows[j];
      const float total = sum_of(totals);
      const Vec out = (sums[0] + sums[1] + sums[2] + sums[3]) / total;
      std::memcpy(a.out + row * 16, &out, sizeof(Vec));
      a.lse[row] = top + std::log(total);
      a.mean[row] = sum_of(weighted) / total;
    }
  }
}

void backward_16(const Attention& a) {
  const int64_t T = a.T;
  Tokens k(T), v(T);
  Vectors dk(T), dv(T), weights(k.blocks), d_scores(k.blocks);
  const float *p = weights.floats(), *ds = d_scores.floats();
  for (int64_t g = 0; g < a.G; ++g) {
    k.load(a.k + g * T * 16);
    v.load(a.v + g * T * 16);
    dk.clear(T);
    dv.clear(T);
    for (int64_t i = 0; i < T; ++i) {
      const int64_t row = g * T + i;
      Vec qi, d_outi, outi, dqi[2]{};
      std::memcpy(&qi, a.q + row * 16, sizeof(Vec));
      std::memcpy(&d_outi, a.d_out + row * 16, sizeof(Vec));
      std::memcpy(&outi, a.out + row * 16, sizeof(Vec));
      const float de = a.d_entropy ? a.d_entropy[row] : 0.0f;
      const float constant = de * a.mean[row] - sum_of(d_outi * outi);
      for (int64_t block = 0; block <= i / 16; ++block) {
        const Vec s = k.products(a.q + row * 16, block), below = s - a.lse[row];
        Vec weight = exponential(below > 0.0f ? Vec{} : below);
        weight = LANE + int32_t(16 * block) > int32_t(i) ? Vec{} : weight;
        weights[block] = weight;
        d_scores[block] = weight * (v.products(a.d_out + row * 16, block) + constant - de * s);
      }
      for (int64_t j = 0; j <= i; ++j) {
        dqi[j % 2] += ds[j] * k.rows[j];
        dk[j] += ds[j] * qi;
        dv[j] += p[j] * d_outi;
      }
      dqi[0] += dqi[1];
      std::memcpy(a.dq + row * 16, &dqi[0], sizeof(Vec));
    }
    std::memcpy(a.dk + g * T * 16, dk.at(0), T * sizeof(Vec));
    std::memcpy(a.dv + g * T * 16, dv.at(0), T * sizeof(Vec));
  }
}

// C += A B, with A (rows, K) and B (K, columns). A_row is the distance between two rows of A, in
// floats; the same for its columns and the rows of B and C.
struct Product {
  const float* A;
  int64_t A_row, A_column;
  const float* B;
  int64_t B_row;
  float* C;
  int64_t C_row, K;
};

template <int ROWS, int S>  // S vectors of columns; the sums stay in registers
void add_rows(const Product& p, int64_t first) {
  const float* a = p.A + first * p.A_row;
  float* c = p.C + first * p.C_row;
  Vec sums[ROWS][S];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sums[r][s] = *(const LooseVec*)(c + r * p.C_row + s * LANES);
  for (int64_t k = 0; k < p.K; ++k) {
    Vec b[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) b[s] = *(const LooseVec*)(p.B + k * p.B_row + s * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * p.A_row + k * p.A_column];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sums[r][s] += factor * b[s];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) *(LooseVec*)(c + r * p.C_row + s * LANES) = sums[r][s];
}

template <int S>  // as many rows at a time as there are registers
void add_product(const Product& p, int64_t rows) {
  constexpr int MOST = S < 3 ? 12 : 24 / S;
  int64_t r = 0;
  for (; r + MOST <= rows; r += MOST) add_rows<MOST, S>(p, r);
  if (rows - r >= 8) add_rows<8, S>(p, r), r += 8;
  if (rows - r >= 4) add_rows<4, S>(p, r), r += 4;
  if (rows - r >= 2) add_rows<2, S>(p, r), r += 2;
  if (rows - r >= 1) add_rows<1, S>(p, r);
}

// `columns` is a multiple of 16.
void add_product(const Product& all, int64_t rows, int64_t columns) {
  constexpr int64_t L1_ROWS = 104;  // of B: 64 columns of them stay in the L1 cache
  for (int64_t k = 0; k < all.K; k += L1_ROWS) {
    Product p = all;
    p.A += k * p.A_column;
    p.B += k * p.B_row;
    p.K = std::min(L1_ROWS, all.K - k);
    for (int64_t left = columns / LANES; left > 0;) {
      const int64_t S = left > 4 && left % 4 ? 3 : std::min<int64_t>(left, 4);
      if (S == 4) add_product<4>(p, rows);
      if (S == 3) add_product<3>(p, rows);
      if (S == 2) add_product<2>(p, rows);
      if (S == 1) add_product<1>(p, rows);
      p.B += S * LANES;
      p.C += S * LANES;
      left -= S;
    }
  }
}

typedef void (*Kernel)(const Attention&);

struct Kernels {
  int64_t C;
  Kernel forward, backward;
};

const Kernels KERNELS[] = {
    {2, forward<2>, backward<2>},    {3, forward<3>, backward<3>}, {6, forward<6>, backward<6>},
    {8, forward<8>, backward<8>},    {16, forward_16, backward_16},
    {26, forward<26>, backward<26>},
};

const Kernels* kernels_for(int64_t C) {
  return std::find_if(std::begin(KERNELS), std::end(KERNELS), [C](auto& k) { return k.C == C; });
}

}  // namespace

extern "C" {

int has_kernels(int64_t C) { return kernels_for(C) != std::end(KERNELS); }

// C: a number of channels for which has_kernels is 1.
void attention_forward(const float* q, const float* k, const float* v, float* out, float* lse,
                       float* mean, int64_t G, int64_t T, int64_t C) {
  kernels_for(C)->forward({q, k, v, out, lse, mean, 0, 0, 0, 0, 0, G, T});
}

void attention_backward(const float* q, const float* k, const float* v, float* out, float* lse,
                        float* mean, const float* d_out, const float* d_entropy, float* dq,
                        float* dk, float* dv, int64_t G, int64_t T, int64_t C) {
  kernels_for(C)->backward({q, k, v, out, lse, mean, d_out, d_entropy, dq, dk, dv, G, T});
}

// Turns bf16 logits (n, V) into softmax - onehot, in place, and returns the summed cross-entropy in
// nats. `bias` (V) is added to the logits first, and the sum of the gradient over rows to `d_bias`
// (V); both may be null.
double cross_entropy(uint16_t* logits, const float* bias, const int64_t* targets, float* d_bias,
                     int64_t n, int64_t V) {
  const int64_t full = V / LANES, vectors = (V + LANES - 1) / LANES;  // the last may be partial
  Vectors values(vectors);
  float* x = values.floats();
  double loss = 0;
  for (int64_t r = 0; r < n; ++r) {
    uint16_t* row = logits + r * V;
    Vec highest = Vec{} - INFINITY, sums{};
    for (int64_t i = full * LANES; i < vectors * LANES; ++i) {
      const uint32_t bits = i < V ? uint32_t(row[i]) << 16 : 0xff800000u;  // -infinity
      std::memcpy(x + i, &bits, 4);
      if (bias && i < V) x[i] += bias[i];
    }
    if (vectors > full) highest = values[full];
    for (int64_t i = 0; i < full; ++i) {
      const Bf16 number = *reinterpret_cast<Bf16*>(row + i * LANES);
      Vec value = (Vec)(__builtin_convertvector(number, Ints) << 16);
      if (bias) value += *reinterpret_cast<const LooseVec*>(bias + i * LANES);
      values[i] = value;
      highest = value > highest ? value : highest;
    }
    const float top = largest_of(highest), of_target = x[targets[r]];
    for (int64_t i = 0; i < vectors; ++i) {
      values[i] = exponential(values[i] - top);
      sums += values[i];
    }
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
    loss += top + std::log(total) - of_target;
    x[targets[r]] -= float(total);  // softmax - onehot, times the total
    for (int64_t i = 0; i < vectors; ++i) {
      const Vec p = values[i] * float(1 / total);
      Ints bits = (Ints)p;
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest bf16
      if (i < full) {
        *reinterpret_cast<Bf16*>(row + i * LANES) = __builtin_convertvector(bits, Bf16);
        if (d_bias) *reinterpret_cast<LooseVec*>(d_bias + i * LANES) += p;
      } else {
        for (int lane = 0; i * LANES + lane < V; ++lane) {
          row[i * LANES + lane] = uint16_t(bits[lane]);
          if (d_bias) d_bias[i * LANES + lane] += p[lane];
        }
      }
    }
  }
  return loss;
}

// Whether linear_cross_entropy is fast here: its products need 32 registers of 16 numbers.
int has_products() {
#ifdef __AVX512F__
  return 1;
#else
  return 0;
#endif
}

// Cross-entropy of a float32 output layer: hidden states x (n, d), weight w (V, d), bias (V) or
// null. Returns the sum over rows in nats, and its gradients dx (n, d), dw (V, d) and db (V) or null,
// which are zeros at first. d is a multiple of 16; no logit of row r is above limit[r]. Returns NaN
// where the exponentials of a row become too small.
double linear_cross_entropy(const float* x, const float* w, const float* bias,
                            const int64_t* targets, const float* limit, float* dx, float* dw,
                            float* db, int64_t n, int64_t d, int64_t V) {
  constexpr int64_t CHUNK = 384, WIDTH = 64;  // tokens of the text, tokens of the vocabulary
  constexpr float HIGHEST = 70, LOWEST = -60;  // exponents
  const int64_t panels = (V + WIDTH - 1) / WIDTH;
  // Kept, as new memory costs as much as a product.
  static thread_local Vectors columns, exponentials, scaled;
  columns.reserve(panels * WIDTH * d / LANES);
  exponentials.reserve(panels * WIDTH * CHUNK / LANES);
  scaled.reserve(CHUNK * d / LANES);
  float *w_columns = columns.floats(), *xs = scaled.floats();
  for (int64_t p = 0; p < panels; ++p)  // (panels, d, WIDTH), zeros after the last
    for (int64_t k = 0; k < d; ++k)
      for (int64_t v = p * WIDTH; v < (p + 1) * WIDTH; ++v)
        *w_columns++ = v < V ? w[v * d + k] : 0;
  double loss = 0;
  for (int64_t start = 0; start < n; start += CHUNK) {
    const int64_t m = std::min(CHUNK, n - start);
    const float* rows = x + start * d;
    float shift[CHUNK], inverse[CHUNK], *gradient = dx + start * d;
    Vec totals[CHUNK]{};
    for (int64_t r = 0; r < m; ++r) {
      const int64_t target = targets[start + r];
      float logit = bias ? bias[target] : 0;
      for (int64_t k = 0; k < d; ++k) logit += rows[r * d + k] * w[target * d + k];
      shift[r] = std::max(logit, limit[start + r] - HIGHEST);
      loss += shift[r] - logit;
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * WIDTH, width = std::min(WIDTH, V - first);
      float* e = exponentials.floats() + first * m;  // (m, WIDTH): first the logits
      float biases[WIDTH]{};
      if (bias) std::copy_n(bias + first, width, biases);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t v = 0; v < WIDTH; ++v) e[r * WIDTH + v] = biases[v] - shift[r];
      add_product({rows, d, 1, columns.floats() + first * d, WIDTH, e, WIDTH, d}, m, WIDTH);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t v = 0; v < WIDTH; v += LANES) {
          Vec* values = reinterpret_cast<Vec*>(e + r * WIDTH + v);
          *values = LANE + int32_t(v) < int32_t(width) ? exponential(*values) : Vec{};
          totals[r] += *values;
        }
      add_product({e, WIDTH, 1, w + first * d, d, gradient, d, width}, m, d);
    }
    for (int64_t r = 0; r < m; ++r) {
      const int64_t target = targets[start + r];
      const float total = sum_of(totals[r]);
      if (!(total > std::exp(LOWEST))) return NAN;
      loss += std::log(total);
      inverse[r] = 1 / total;
      for (int64_t k = r * d; k < (r + 1) * d; ++k) {
        xs[k] = rows[k] * inverse[r];
        gradient[k] = gradient[k] * inverse[r] - w[target * d + k - r * d];
        dw[target * d + k - r * d] -= rows[k];
      }
      if (db) db[target] -= 1;
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * WIDTH, width = std::min(WIDTH, V - first);
      const float* e = exponentials.floats() + first * m;
      add_product({e, 1, WIDTH, xs, d, dw + first * d, d, m}, width, d);
      if (!db) continue;
      float sums[WIDTH]{};
      add_product({inverse, 0, 1, e, WIDTH, sums, WIDTH, m}, 1, WIDTH);
      for (int64_t v = 0; v < width; ++v) db[first + v] += sums[v];
    }
  }
  return loss;
}

}  // extern "C"
