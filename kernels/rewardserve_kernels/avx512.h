// What the C++ for CPUs with bf16 dot products (AVX512_BF16) has in common.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;  // fp32 in a register, or pairs of bf16
constexpr float LOG2E = 1.44269504088896341f;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// 2^x, 0 for -inf, NaN for NaN. Relative error below 3e-7. Of +inf, x - whole is NaN, and scalef makes inf of that:
// what the logistic function of a very negative number needs.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order: of a NaN the second operand is returned
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.320285999e-3f);  // the least greatest error on [-1/2, 1/2] of those that are 1 at 0
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.674952837e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.551047799e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022165982e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314659563e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

inline __m512 tanh(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(15.0f), x);  // 1 from there on
    const __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2E)));
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

}  // namespace
