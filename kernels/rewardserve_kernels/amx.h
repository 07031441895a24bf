// Products on matrix units (AMX), where the compiler targets a CPU with them: 16 rows by 16 columns at a time, over 32
// inner dimensions in one instruction. Factors are bf16. Sums are fp32, and each takes its products in the order of the
// inner dimension, whatever lies beside it.
//
// A right factor lies as the dot products of avx512.h want it: in pairs of bf16, [inner / 2, columns, 2].

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "avx512.h"

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_COLUMNS = 16, TILE_INNER = 32;  // a row of a tile is 64 bytes
constexpr int64_t PAIR = 2 * TILE_ROWS;  // rows that are multiplied at a time

// Where the tiles of a left factor are, in elements: its first, from one row to the next, from 32 inner dimensions to
// the next, and from 16 rows to those below.
struct Left {
    const bf16* first;
    int64_t row, ahead, below;
};

#ifdef __AMX_BF16__

// Whether this process may use the tiles: Linux gives them to those who ask (its Documentation/arch/x86/xstate.rst).
inline bool may_use_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool may = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return may;
}

// All eight tiles of the calling thread, each 16 rows of 64 bytes, for as long as this lives.
class Tiles {
   public:
    Tiles() {
        Layout layout;
        std::fill_n(layout.row_bytes, 8, 64);
        std::fill_n(layout.rows, 8, TILE_ROWS);
        _tile_loadconfig(&layout);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

   private:
    struct alignas(64) Layout {  // as the instruction wants it
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
};

// R by C tiles. Two by two makes four products of four loads, and no other way to share out eight registers makes more.
// What is in c is added to if `more`. `between` is called after each 32 inner dimensions: the matrix unit is busy for 64
// cycles then, and nothing else is.
template <int R, int C, typename Between>
inline void multiply_tiles(const Left& a, const bf16* b, int64_t b_pair, int64_t inner, bool more, float* c, int64_t c_row,
                           Between between) {
    const int64_t row_bytes = c_row * sizeof(float);
    float* const below = c + TILE_ROWS * c_row;
    if (more) {
        _tile_loadd(0, c, row_bytes);
        if (C > 1) _tile_loadd(1, c + TILE_COLUMNS, row_bytes);
        if (R > 1) _tile_loadd(2, below, row_bytes);
        if (R > 1 && C > 1) _tile_loadd(3, below + TILE_COLUMNS, row_bytes);
    } else {
        _tile_zero(0);
        if (C > 1) _tile_zero(1);
        if (R > 1) _tile_zero(2);
        if (R > 1 && C > 1) _tile_zero(3);
    }
    const bf16* rows = a.first;
    for (int64_t i = 0; i < inner; i += TILE_INNER, rows += a.ahead, b += TILE_INNER / 2 * b_pair) {
        _tile_loadd(4, rows, a.row * sizeof(bf16));
        _tile_loadd(6, b, b_pair * sizeof(bf16));
        if (C > 1) _tile_loadd(7, b + 2 * TILE_COLUMNS, b_pair * sizeof(bf16));
        if (R > 1) _tile_loadd(5, rows + a.below, a.row * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        if (C > 1) _tile_dpbf16ps(1, 4, 7);
        if (R > 1) _tile_dpbf16ps(2, 5, 6);
        if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
        between();
    }
    _tile_stored(0, c, row_bytes);
    if (C > 1) _tile_stored(1, c + TILE_COLUMNS, row_bytes);
    if (R > 1) _tile_stored(2, below, row_bytes);
    if (R > 1 && C > 1) _tile_stored(3, below + TILE_COLUMNS, row_bytes);
}

// c [PAIR, columns] = a b, or of its first 16 rows if no more than `rows` are wanted. `inner` is a multiple of TILE_INNER,
// `columns` of TILE_COLUMNS; rows of c are c_row apart, pairs of rows of b are b_pair.
inline void multiply_on_tiles(int64_t rows, int64_t columns, const Left& a, const bf16* b, int64_t b_pair, int64_t inner,
                              float* c, int64_t c_row) {
    constexpr auto nothing = [] {};
    const bool two = rows > TILE_ROWS;
    for (; columns >= 2 * TILE_COLUMNS; columns -= 2 * TILE_COLUMNS, b += 4 * TILE_COLUMNS, c += 2 * TILE_COLUMNS)
        two ? multiply_tiles<2, 2>(a, b, b_pair, inner, false, c, c_row, nothing)
            : multiply_tiles<1, 2>(a, b, b_pair, inner, false, c, c_row, nothing);
    if (columns)
        two ? multiply_tiles<2, 1>(a, b, b_pair, inner, false, c, c_row, nothing)
            : multiply_tiles<1, 1>(a, b, b_pair, inner, false, c, c_row, nothing);
}

#else

inline bool may_use_tiles() { return false; }
struct Tiles {};
inline void multiply_on_tiles(int64_t, int64_t, const Left&, const bf16*, int64_t, int64_t, float*, int64_t) {}
template <int R, int C, typename Between>
inline void multiply_tiles(const Left&, const bf16*, int64_t, int64_t, bool, float*, int64_t, Between) {}

#endif

}  // namespace
