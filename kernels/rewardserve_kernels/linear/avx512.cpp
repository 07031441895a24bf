// Linear layers for CPUs with bf16 dot products (AVX512_BF16), on matrix units where there are some (amx.h). Built and
// called by avx512.py.
//
// x [rows, inner] in bf16 times a weight laid out ahead of time; sums in fp32, and what becomes of them while they are
// still in registers, or in the first cache. A weight lies in panels of PANEL columns, [panels, inner / 2, PANEL, 2]: the
// pairs of bf16 that a dot product takes lie side by side, and a panel is read from one end to the other. On matrix units
// a panel is two halves, one after the other, each of which is as wide as a product of tiles.
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
constexpr int64_t TILES_BYTES = 1 << 20;    // the same on matrix units: half of their second cache
constexpr int64_t MIN_BLOCK = 4 * ROWS, MAX_BLOCK = 32 * ROWS;
constexpr int64_t MAX_PART = 1536;          // inner dimensions at a time on matrix units
constexpr int64_t SUMS_BYTES = 1 << 21;     // of sums of one part, for the next one to be added to
constexpr int64_t MIN_TILES_BLOCK = 4 * PAIR, MAX_TILES_BLOCK = 16 * PAIR;
constexpr int64_t GROUP_BYTES = 4 << 20;    // of weights that all rows go over while they lie in the last cache
constexpr int64_t HALF = 2 * TILE_COLUMNS;
static_assert(2 * HALF == PANEL && HALF == FACTORS);
// Of rows and of a half that are multiplied at a time on matrix units: 16 KB of each, so that the rows are still in the
// first cache, of 48, for the other half. All of 768 at a time is a third slower.
constexpr int64_t TILES_INNER = 256;
constexpr int PIECES_PER_THREAD = 4;        // enough that all threads end at about the same time

constexpr int64_t LINE = 64;                // bytes of a line of the caches
constexpr int64_t AHEAD = 16;               // inner dimensions that a weight is fetched before it is needed
constexpr int64_t STREAMED_BYTES = 4 << 20; // results from this size on go past the caches: who reads them comes later

enum Kind : int32_t { FP32, SILU, GELU_TANH, ADD };

// As in avx512.py.
struct Product {
    const bf16* x;        // [rows, inner], rows x_row apart
    const bf16* weight;   // in panels
    const float* bias;    // [columns] or null
    void* out;            // [rows, columns], fp32 sums; or, of gated kinds, products in bf16
    int64_t rows, inner, columns, x_row;
    const int64_t* to;    // [rows], for ADD: the rows of `out` that sums are added to, no two the same
    const float* scale;   // [rows], for ADD: what they are multiplied by before
    Kind kind;
};

inline bool is_gated(Kind kind) { return kind == SILU || kind == GELU_TANH; }

constexpr __mmask16 ALL_LANES = 0xffff;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

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
    if (!is_gated(p.kind)) {
        for (int n = 0; n < VECTORS; n++) {
            const int64_t column = panel * PANEL + n * LANES;
            const __mmask16 mask = first_lanes(p.columns - column);
            const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + column) : _mm512_setzero_ps();
            for (int r = 0; r < R; r++) {
                const bool adds = p.kind == ADD;
                float* out = (float*)p.out + (adds ? p.to[row + r] : row + r) * p.columns + column;
                __m512 sum = _mm512_add_ps(sums[r][n], bias);
                if (adds) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(p.scale[row + r]), _mm512_maskz_loadu_ps(mask, out));
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

// What waits while the matrix unit multiplies: the sums of the rows before, to be finished, and the panel after this one,
// to be fetched into the second cache. One after the other they would take a quarter of the time of a product.
class Meanwhile {
   public:
    Meanwhile(const Product& p, bool streamed) : p_(p), streamed_(streamed) {}

    // Sums [last - row, PANEL] of rows [row, last), within so many calls. Those before are finished.
    void finish_later(const float* sums, int64_t row, int64_t last, int64_t panel, int64_t calls) {
        finish_all();
        sums_ = sums, row_ = row, last_ = last, panel_ = panel;
        rows_at_once_ = divide_up(last - row, calls);
    }

    // `bytes` from each of two places on, within so many calls.
    void fetch(const bf16* first, const bf16* second, int64_t bytes, int64_t calls) {
        next_[0] = (const char*)first, next_[1] = (const char*)second;
        end_[0] = next_[0] + bytes, end_[1] = next_[1] + bytes;
        bytes_at_once_ = round_up(divide_up(bytes, calls), LINE);
    }

    void operator()() {
        finish_rows(std::min(last_, row_ + rows_at_once_));
        for (int n = 0; n < 2; n++)
            for (const char* stop = std::min(end_[n], next_[n] + bytes_at_once_); next_[n] < stop; next_[n] += LINE)
                _mm_prefetch(next_[n], _MM_HINT_T1);
    }

    void finish_all() { finish_rows(last_); }

   private:
    void finish_rows(int64_t end) {
        for (; row_ < end; row_++, sums_ += PANEL) {
            __m512 sums[1][VECTORS];
            for (int n = 0; n < VECTORS; n++) sums[0][n] = _mm512_load_ps(sums_ + n * LANES);
            finish<1>(p_, sums, row_, panel_, streamed_);
        }
    }

    const Product& p_;
    const bool streamed_;
    const float* sums_ = nullptr;
    int64_t row_ = 0, last_ = 0, panel_ = 0, rows_at_once_ = 0;
    const char *next_[2] = {}, *end_[2] = {};
    int64_t bytes_at_once_ = 0;
};

// A PAIR of rows as tiles, or 16 rows, times a panel whose halves are `half_size` apart: sums [PAIR, PANEL], to be added to
// what is there if `more`.
void multiply_pair(const bf16* tiles, bool two, const bf16* weight, int64_t half_size, int64_t inner, bool more, float* sums,
                   Meanwhile& meanwhile) {
    auto between = [&] { meanwhile(); };
    for (int64_t i = 0; i < inner; i += TILES_INNER, more = true)
        for (int half = 0; half < 2; half++) {
            const Left rows = {tiles + i * TILE_ROWS, TILE_INNER, TILE_ROWS * TILE_INNER, TILE_ROWS * inner};
            const bf16* columns = weight + half * half_size + i * HALF;
            const int64_t count = std::min(TILES_INNER, inner - i);
            float* c = sums + half * HALF;
            two ? multiply_tiles<2, 2>(rows, columns, 2 * HALF, count, more, c, PANEL, between)
                : multiply_tiles<1, 2>(rows, columns, 2 * HALF, count, more, c, PANEL, between);
        }
}

// Rows [row, last) and panels [panel, end) on matrix units, `part` inner dimensions after the other. `tiles` has room for
// so much of the rows, rounded up to a PAIR; what is in the rest of it becomes sums that nobody reads. `sums` has room
// for two PAIRs and a panel, or if there are several parts, for all rows and panels.
void multiply_pairs(const Product& p, int64_t row, int64_t last, int64_t panel, int64_t end, int64_t part, bf16* tiles,
                    float* sums, bool streamed) {
    Meanwhile meanwhile(p, streamed);
    const int64_t half_size = HALF * p.inner, pairs = divide_up(last - row, PAIR);
    for (int64_t from = 0; from < p.inner; from += part) {
        const int64_t inner = std::min(part, p.inner - from), calls = 2 * inner / TILE_INNER;
        lay_out(p.x + row * p.x_row + from, p.x_row, last - row, inner, tiles);
        for (int64_t n = panel, number = 0; n < end; n++) {
            const bf16 *weight = p.weight + 2 * n * half_size + from * HALF, *next = weight + 2 * half_size;
            if (n + 1 < end) meanwhile.fetch(next, next + half_size, inner * HALF * sizeof(bf16), pairs * calls);
            for (int64_t r = row; r < last; r += PAIR, number++) {
                float* c = sums + (part < p.inner ? number : number % 2) * PAIR * PANEL;
                const bool two = last - r > TILE_ROWS;
                multiply_pair(tiles + (r - row) * inner, two, weight, half_size, inner, from > 0, c, meanwhile);
                if (from + inner == p.inner) meanwhile.finish_later(c, r, std::min(last, r + PAIR), n, calls);
            }
        }
    }
    meanwhile.finish_all();
}

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

// Pieces of work: so many rows and panels, and on matrix units so many inner dimensions at a time.
struct Cut {
    int64_t rows, panels, part;
};

int64_t panels_of(const Product& p) { return divide_up(p.columns, is_gated(p.kind) ? FACTORS : PANEL); }

Cut cut(const Product& p, bool on_tiles, int64_t num_threads) {
    const int64_t parts = on_tiles ? divide_up(p.inner, MAX_PART) : 1, pieces = PIECES_PER_THREAD * num_threads;
    const int64_t part = parts > 1 ? round_up(divide_up(p.inner, parts), TILES_INNER) : p.inner;
    int64_t rows;
    if (on_tiles)  // not cut by columns alone if they are few: rows are laid out anew for each piece
        rows = std::clamp(round_up(std::min<int64_t>(TILES_BYTES / (sizeof(bf16) * part), p.rows / pieces), PAIR),
                          MIN_TILES_BLOCK, MAX_TILES_BLOCK);
    else
        rows = std::clamp<int64_t>(round_down(BLOCK_BYTES / (sizeof(bf16) * part), ROWS), MIN_BLOCK, MAX_BLOCK);
    int64_t panels = std::min<int64_t>(GROUP_BYTES / (PANEL * sizeof(bf16) * part),
                                       divide_up(panels_of(p) * divide_up(p.rows, rows), pieces));
    if (parts > 1) panels = std::min<int64_t>(panels, SUMS_BYTES / (rows * PANEL * sizeof(float)));
    return {rows, std::max<int64_t>(panels, 1), part};
}

}  // namespace

// Whether products with so many inner dimensions are computed on matrix units: a weight lies for those that compute it.
extern "C" int32_t uses_tiles(int64_t inner) { return inner % TILE_INNER == 0 && may_use_tiles(); }

extern "C" void linear(const Product* product, int32_t num_threads) {
    const Product& p = *product;
    const int64_t out_row_bytes = p.columns * (is_gated(p.kind) ? sizeof(bf16) : sizeof(float));
    const bool aligned = (uintptr_t)p.out % LINE == 0 && out_row_bytes % LINE == 0;
    const bool streamed = aligned && p.kind != ADD && p.rows * out_row_bytes >= STREAMED_BYTES;
    const bool on_tiles = uses_tiles(p.inner);
    const Cut piece = cut(p, on_tiles, num_threads);
    const int64_t blocks = divide_up(p.rows, piece.rows), groups = divide_up(panels_of(p), piece.panels);
    const int64_t rows = round_up(std::min(piece.rows, p.rows), PAIR);
    const int64_t num_tiles = on_tiles ? rows * piece.part : 0;
    const int64_t num_sums = !on_tiles            ? (p.inner > INNER ? piece.rows * PANEL : 0)
                             : piece.part < p.inner ? rows * piece.panels * PANEL
                                                    : 2 * PAIR * PANEL;
#pragma omp parallel num_threads(num_threads)
    {
        const auto tiles = scratch<bf16>(num_tiles);
        const auto sums = scratch<float>(num_sums);
        const std::optional<Tiles> configured = on_tiles ? std::optional<Tiles>(std::in_place) : std::nullopt;
#pragma omp for schedule(dynamic) nowait
        for (int64_t number = 0; number < groups * blocks; number++) {
            const int64_t row = number % blocks * piece.rows, panel = number / blocks * piece.panels;
            const int64_t last = std::min(row + piece.rows, p.rows), end = std::min(panel + piece.panels, panels_of(p));
            if (on_tiles)
                multiply_pairs(p, row, last, panel, end, piece.part, tiles.get(), sums.get(), streamed);
            else
                for (int64_t n = panel; n < end; n++) multiply_rows(p, row, last, n, sums.get(), streamed);
        }
        _mm_sfence();  // what was streamed is there when the others are told that this thread is done
    }
}
