"""Triton's interpreter with bf16 that means bf16.

The interpreter keeps bf16 as 16-bit integers: a product multiplies bit patterns, and a conversion from fp32 cuts the mantissa off instead
of rounding it to nearest even. `correct_bfloat16` repairs both; everything else a kernel does with bf16 operands (converting, loading,
storing) is right as it is. Arithmetic on bf16 values other than `tl.dot` stays wrong there: kernels convert to fp32 first.
"""

import numpy as np


def correct_bfloat16() -> None:
    """Patch the interpreter of the installed Triton, once; needs TRITON_INTERPRET=1 to have been set before triton was imported."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_corrected", False):
        return
    dot, convert = builder.create_dot, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
            return np.where(np.isnan(data.view(np.float32)), 0x7FC0, nearest_even >> 16).astype(np.uint16)
        return convert(data, input_dtype, output_dtype, rounding_mode)

    builder.create_dot, interpreter._convert_float = create_dot, convert_float
    builder.bfloat16_corrected = True
