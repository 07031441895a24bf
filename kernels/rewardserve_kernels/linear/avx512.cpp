// Linear layers for CPUs with bf16 dot products (AVX512_BF16), on matrix units where there are some (amx.h). Built and
// called by avx512.py.
//
// x [rows, inner] in bf16 times a weight laid out ahead of time; sums in fp32, and what becomes of them while they are
// still in registers. A weight lies in panels of PANEL columns, [panels, inner / 2, PANEL, 2]: the pairs of bf16 that a
// dot product takes lie side by side, and a panel is read from one end to the other.
//
// Batch invariance. Each sum takes its products in the order of `inner`, whatever lies beside it and whoever computes it;
// which instructions compute it depends on `inner` and the CPU alone.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>

#include "amx.h"
#include "avx512.h"

namespace {

constexpr int VECTORS = 4;                  // registers of a panel's columns
constexpr int64_t PANEL = VECTORS * LANES;  // as in avx512.py
constexpr int64_t FACTORS = PANEL / 2;      // columns of a gated product in a panel: the gate's, then the other factor's
static_assert(FACTORS == 32, "a register of bf16");
constexpr int ROWS = 6;                     // rows whose sums are in registers at a time: 24 of 32
constexpr int64_t INNER = 4096;             // of a panel at a time: half of a second cache of a megabyte
constexpr int64_t BLOCK_BYTES = 256 << 10;  // of the rows of one piece of work: a quarter of it
constexpr int64_t TILES_BYTES = 1 << 20;    // the same on matrix units, which are through with a block the sooner
constexpr int64_t MIN_BLOCK = 4 * ROWS, MAX_BLOCK = 32 * ROWS;
constexpr int64_t GROUP_BYTES = 4 << 20;    // of weights that all rows go over while they lie in the last cache
static_assert(MAX_BLOCK % PAIR == 0);
constexpr int PIECES_PER_THREAD = 4;        // enough that all threads end at about the same time

constexpr int64_t LINE = 64;                // bytes of a line of the caches
constexpr int64_t AHEAD = 16;               // inner dimensions that a weight is fetched before it is needed
constexpr int64_t STREAMED_BYTES = 4 << 20; // results from this size on go past the caches: who reads them comes later

enum Kind : int32_t { FP32, SILU, GELU_TANH };

// As in avx512.py.
struct Product {
    const bf16* x;        // [rows, inner], rows x_row apart
    const bf16* weight;   // in panels
    const float* bias;    // [columns] or null
    void* out;            // [rows, columns], fp32 sums; or, for all other kinds, products in bf16
    int64_t rows, inner, columns, x_row;
    Kind kind;
};

constexpr __mmask16 ALL_LANES = 0xffff;

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1; }
inline __mmask16 first_lanes(int64_t count) { return first_of_32(count); }

// x times the logistic function of t.
inline __m512 gated(__m512 x, __m512 t) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp2(_mm512_mul_ps(t, _mm512_set1_ps(-LOG2E)))));
}

inline __m512 silu(__m512 x) { return gated(x, x); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, arXiv 1606.08415): as logistic of 2 u.
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cubic = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f * 0.044715f), _mm512_mul_ps(x, x));
    return gated(x, _mm512_mul_ps(x, _mm512_add_ps(_mm512_set1_ps(1.5957691216f), cubic)));
}

// What becomes of the finished sums of R rows from `row` on.
template <int R>
inline void finish(const Product& p, const __m512 (&sums)[R][VECTORS], int64_t row, int64_t panel, bool streamed) {
    if (p.kind == FP32) {
        for (int n = 0; n < VECTORS; n++) {
            const int64_t column = panel * PANEL + n * LANES;
            const __mmask16 mask = first_lanes(p.columns - column);
            const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + column) : _mm512_setzero_ps();
            for (int r = 0; r < R; r++) {
                float* out = (float*)p.out + (row + r) * p.columns + column;
                const __m512 sum = _mm512_add_ps(sums[r][n], bias);
                if (streamed && mask == ALL_LANES)
                    _mm512_stream_ps(out, sum);
                else
                    _mm512_mask_storeu_ps(out, mask, sum);
            }
        }
        return;
    }
    const int64_t column = panel * FACTORS;
    for (int r = 0; r < R; r++) {
        __m512 products[2];
        for (int n = 0; n < 2; n++) {
            const __m512 gate = p.kind == SILU ? silu(sums[r][n]) : gelu_tanh(sums[r][n]);
            products[n] = _mm512_mul_ps(gate, sums[r][n + 2]);
        }
        bf16* out = (bf16*)p.out + (row + r) * p.columns + column;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(products[1], products[0]);
        if (streamed && column + FACTORS <= p.columns)
            _mm512_stream_si512((__m512i*)out, both);
        else
            _mm512_mask_storeu_epi16(out, first_of_32(p.columns - column), both);
    }
}

// R rows and a panel, over inner dimensions [from, to); unfinished sums [R, PANEL] wait in `partial`.
template <int R>
inline void multiply(const Product& p, int64_t row, int64_t panel, int64_t from, int64_t to, float* partial,
                     bool streamed) {
    __m512 sums[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++)
            sums[r][n] = from ? _mm512_loadu_ps(partial + r * PANEL + n * LANES) : _mm512_setzero_ps();
    const bf16* x = p.x + row * p.x_row;
    const bf16* weight = p.weight + panel * PANEL * p.inner;
    for (int64_t i = from; i < to; i += 2) {
        __m512bh columns[VECTORS];
        for (int n = 0; n < VECTORS; n++)
            columns[n] = (__m512bh)_mm512_loadu_si512(weight + i * PANEL + n * 2 * LANES);
        for (int n = 0; n < VECTORS; n++)
            _mm_prefetch((const char*)(weight + (i + AHEAD) * PANEL + n * 2 * LANES), _MM_HINT_T0);
        for (int r = 0; r < R; r++) {
            int32_t both;
            std::memcpy(&both, x + r * p.x_row + i, sizeof both);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            for (int n = 0; n < VECTORS; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], pair, columns[n]);
        }
    }
    if (to == p.inner) return finish<R>(p, sums, row, panel, streamed);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++) _mm512_storeu_ps(partial + r * PANEL + n * LANES, sums[r][n]);
}

// Rows [row, last) and a panel.
void multiply_rows(const Product& p, int64_t row, int64_t last, int64_t panel, float* partial, bool streamed) {
    for (int64_t from = 0; from < p.inner; from += INNER) {
        const int64_t to = std::min(from + INNER, p.inner);
        int64_t r = row;
        float* waiting = partial;
        for (; r + ROWS <= last; r += ROWS, waiting += ROWS * PANEL) multiply<ROWS>(p, r, panel, from, to, waiting, streamed);
        switch (last - r) {
            case 5: multiply<5>(p, r, panel, from, to, waiting, streamed); break;
            case 4: multiply<4>(p, r, panel, from, to, waiting, streamed); break;
            case 3: multiply<3>(p, r, panel, from, to, waiting, streamed); break;
            case 2: multiply<2>(p, r, panel, from, to, waiting, streamed); break;
            case 1: multiply<1>(p, r, panel, from, to, waiting, streamed); break;
        }
    }
}

// Rows [count, inner], `stride` apart, as tiles [count / 16, inner / 32]: each in one piece, wherever the rows lie, and
// none that ends beyond the last row.
void lay_out(const bf16* x, int64_t stride, int64_t count, int64_t inner, bf16* tiles) {
    for (int64_t r = 0; r < count; r++) {
        bf16* tile = tiles + round_down(r, TILE_ROWS) * inner + r % TILE_ROWS * TILE_INNER;
        for (int64_t i = 0; i < inner; i += TILE_INNER, tile += TILE_ROWS * TILE_INNER)
            std::memcpy(tile, x + r * stride + i, TILE_INNER * sizeof(bf16));
    }
}

// Rows [row, last) and panels [panel, end) on matrix units. `tiles` has room for the rows, rounded up to a PAIR; what is
// in the rest of it becomes sums that nobody reads.
void multiply_pairs(const Product& p, int64_t row, int64_t last, int64_t panel, int64_t end, bf16* tiles, bool streamed) {
    alignas(LINE) float sums[PAIR * PANEL];
    lay_out(p.x + row * p.x_row, p.x_row, last - row, p.inner, tiles);
    for (; panel < end; panel++)
        for (int64_t r = row; r < last; r += PAIR) {
            const Left rows = {tiles + (r - row) * p.inner, TILE_INNER, TILE_ROWS * TILE_INNER, TILE_ROWS * p.inner};
            multiply_on_tiles(last - r, PANEL, rows, p.weight + panel * PANEL * p.inner, 2 * PANEL, p.inner, sums, PANEL);
            for (int64_t i = 0; i < std::min(PAIR, last - r); i++) {
                __m512 one[1][VECTORS];
                for (int n = 0; n < VECTORS; n++) one[0][n] = _mm512_load_ps(sums + i * PANEL + n * LANES);
                finish<1>(p, one, r + i, panel, streamed);
            }
        }
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of a thread's own, at the beginning of a line; nothing where `count` is 0.
template <typename T>
std::unique_ptr<T[], Free> scratch(int64_t count) {
    void* memory = count ? std::aligned_alloc(LINE, round_up(count * sizeof(T), LINE)) : nullptr;
    if (count && !memory) throw std::bad_alloc();
    return std::unique_ptr<T[], Free>((T*)memory);
}

}  // namespace

extern "C" void linear(const Product* product, int32_t num_threads) {
    const Product& p = *product;
    const int64_t panels = divide_up(p.columns, p.kind == FP32 ? PANEL : FACTORS);
    const int64_t out_row_bytes = p.columns * (p.kind == FP32 ? sizeof(float) : sizeof(bf16));
    const bool aligned = (uintptr_t)p.out % LINE == 0 && out_row_bytes % LINE == 0;
    const bool streamed = aligned && p.rows * out_row_bytes >= STREAMED_BYTES;
    const bool on_tiles = p.inner % TILE_INNER == 0 && may_use_tiles();
    const int64_t row_bytes = sizeof(bf16) * p.inner;
    const int64_t unit = on_tiles ? PAIR : ROWS, most = (on_tiles ? TILES_BYTES : BLOCK_BYTES) / row_bytes;
    const int64_t block = std::clamp(round_down(most, unit), round_up(MIN_BLOCK, unit), MAX_BLOCK);
    const int64_t blocks = divide_up(p.rows, block);
    const int64_t fair = divide_up(panels * blocks, PIECES_PER_THREAD * num_threads);
    const int64_t group = std::clamp<int64_t>(GROUP_BYTES / (PANEL * row_bytes), 1, std::max<int64_t>(fair, 1));
    const int64_t groups = divide_up(panels, group);
#pragma omp parallel num_threads(num_threads)
    {
        const auto partial = scratch<float>(on_tiles || p.inner <= INNER ? 0 : block * PANEL);
        const auto tiles = scratch<bf16>(on_tiles ? round_up(std::min(block, p.rows), PAIR) * p.inner : 0);
        const std::optional<Tiles> configured = on_tiles ? std::optional<Tiles>(std::in_place) : std::nullopt;
#pragma omp for schedule(dynamic) nowait
        for (int64_t piece = 0; piece < groups * blocks; piece++) {
            const int64_t row = piece % blocks * block, panel = piece / blocks * group;
            const int64_t last = std::min(row + block, p.rows), end = std::min(panel + group, panels);
            if (on_tiles)
                multiply_pairs(p, row, last, panel, end, tiles.get(), streamed);
            else
                for (int64_t n = panel; n < end; n++) multiply_rows(p, row, last, n, partial.get(), streamed);
        }
        _mm_sfence();  // what was streamed is there when the others are told that this thread is done
    }
}
