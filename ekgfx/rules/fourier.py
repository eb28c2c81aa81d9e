"""Fourier transforms: what is transformed mixes, and freezes; everything else passes."""

from ekgfx.rules.registry import Call, Effect, rule

ONE_DIM = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
TWO_DIM = ("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2")
ANY_DIM = ("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn", "fftshift", "ifftshift")


@rule(
    *(f"aten.fft_{name}.default" for name in (*ONE_DIM, *TWO_DIM, *ANY_DIM)),
    *(f"aten._fft_{kind}.default" for kind in ("r2c", "c2r", "c2c")),
)
def fourier(call: Call) -> Effect:
    """Every frequency has a part of every position, so the transformed dimensions are frozen before and after."""
    x, dim = call["self"], call["dim"]
    if dim is None:
        lengths = call.args.get("s")
        dim = range(-len(lengths), 0) if lengths else range(len(x))
    gone = {d % len(x) for d in ([dim] if isinstance(dim, int) else dim)}
    call.freeze(*(x[d] for d in gone), why="transformed to frequencies")
    return Effect(tuple(call.constant(n, "frequencies") if d in gone else x[d] for d, n in enumerate(call.shape)))


@rule("aten.view_as_complex.default")
def view_as_complex(call: Call) -> Effect:
    """(*, 2) → (*)."""
    call.freeze(call["self"][-1], why="real and imaginary part")
    return Effect(call["self"][:-1], carries=True)


@rule("aten.view_as_real.default")
def view_as_real(call: Call) -> Effect:
    """(*) → (*, 2)."""
    return Effect((*call["self"], call.constant(2, "real and imaginary part")), carries=True)
