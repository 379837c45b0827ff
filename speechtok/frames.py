"""Frame arithmetic: samples <-> frames, windows of long files.

The only module that knows these formulas. A frame ``i`` of a grid reads the samples
``[i * hop, i * hop + receptive_field)`` and stands for the span
``[offset + i * hop, offset + (i + 1) * hop)``, where ``offset`` puts the middle of the
span on the middle of the samples that were read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from speechtok.errors import InputError

__all__ = ["Context", "FrameGrid", "Window", "WindowRule"]


@dataclass(frozen=True)
class FrameGrid:
    """Where the frames of an encoder lie on the time axis.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave the encoder reads (Hz).
    hop : int
        Samples from one frame to the next.
    receptive_field : int
        Samples one frame reads before any attention, delta or positional context.
    delay : int
        Samples by which a frame's label lags behind the sound (causal models), 0 otherwise.
    partial : bool
        Whether frames that a sound's end fills only in part count (codecs: every sample has a frame). Their encoder
        says what stands behind the end.
    """

    sample_rate: int
    hop: int
    receptive_field: int
    delay: int = 0
    partial: bool = False

    @property
    def offset(self) -> int:
        """Start of frame 0 in samples: its centre minus half a hop."""
        return (self.receptive_field - self.hop) // 2 - self.delay

    @property
    def hop_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.hop / self.sample_rate

    @property
    def offset_seconds(self) -> float:
        """Start of frame 0 in seconds."""
        return self.offset / self.sample_rate

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    def num_frames(self, num_samples: int) -> int:
        """Frames of a sound of `num_samples` samples: those that fit completely, and with `partial` the last one."""
        return self.whole_frames(num_samples + (self.hop - 1 if self.partial and num_samples else 0))

    def whole_frames(self, num_samples: int) -> int:
        """Frames that fit completely into `num_samples` samples."""
        return max(0, (num_samples - self.receptive_field) // self.hop + 1)

    def num_samples(self, num_frames: int) -> int:
        """Fewest samples that hold `num_frames` whole frames."""
        return 0 if num_frames <= 0 else (num_frames - 1) * self.hop + self.receptive_field

    def frame_at(self, sample: int) -> int:
        """Index of the frame whose span holds a sample (may be negative or past the end)."""
        return (sample - self.offset) // self.hop

    def span(self, frame: int) -> tuple[int, int]:
        """Start and end (samples) of the span a frame stands for."""
        start = self.offset + frame * self.hop
        return start, start + self.hop

    def centre_seconds(self, frame: int) -> float:
        """Time of a frame's centre in seconds."""
        return (self.offset + frame * self.hop + self.hop / 2) / self.sample_rate


@dataclass(frozen=True)
class Context:
    """Which frames a frame of an encoder depends on, where that is bounded.

    Encoders without chunks: frame t depends on the samples of the frames ``t - left ... t + right``. Encoders that
    work in chunks: with ``c = (t + look_ahead) // chunk``, on those of the frames
    ``c * chunk - left ... (c + 1) * chunk - 1``; windows of them begin at a multiple of `chunk`.

    Parameters
    ----------
    left, right : int
        Frames; `left` is a multiple of `chunk`, `right` is 0 for encoders in chunks.
    chunk : int
        Frames that are computed together; 1: no chunks.
    look_ahead : int
        Frames by which the answer comes later than its frame (encoders in chunks); at most `left`.
    """

    left: int
    right: int
    chunk: int = 1
    look_ahead: int = 0

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """Frames ``[begin, end)`` whose samples the frames ``[first, last)`` depend on; `end` may pass the sound's."""
        begin = (first + self.look_ahead) // self.chunk * self.chunk - self.left
        end = -(-(last + self.look_ahead) // self.chunk) * self.chunk + self.right
        return max(0, begin), end

    @property
    def most_ahead(self) -> int:
        """Largest number of later frames that a frame waits for."""
        return self.right + self.look_ahead + self.chunk - 1

    def ready(self, frames: int, *, final: bool = True) -> int:
        """Chunks that can be computed when a sound of so many frames ends (`final`) or when more may follow."""
        if final:  # the answer for the last frame comes `look_ahead` frames later
            return -(-(frames + self.look_ahead) // self.chunk) if frames else 0
        return max(0, (frames - self.right) // self.chunk)

    def window(self, grid: FrameGrid, frames: int, begin: int, end: int) -> "Window":
        """Window of the chunks ``[begin, end)`` of a sound of so many frames, with all that they depend on.

        Its frames are those of the whole sound (up to rounding). Chunks before frame ``-look_ahead`` keep none.
        """
        start, stop = max(0, begin * self.chunk - self.left), min(frames, end * self.chunk + self.right)
        first, last = (max(0, index * self.chunk - self.look_ahead) for index in (begin, end))
        samples = grid.num_samples(stop - start)
        return Window(start * grid.hop, start * grid.hop + samples, first, first - start, min(frames, last) - first)


@dataclass(frozen=True)
class Window:
    """A piece of a file that is encoded on its own.

    The samples ``[start, stop)`` are encoded; of the resulting frames those at
    ``[skip, skip + count)`` are kept. They are frames ``first ... first + count - 1`` of the file.
    ``stop`` is None where the window reaches to the end of the file, wherever that is.
    """

    start: int
    stop: int | None
    first: int
    skip: int
    count: int


@dataclass(frozen=True)
class WindowRule:
    """How a long file is cut: a fixed grid that depends on nothing but this rule.

    A file of at most `max_seconds` is one window. A longer one is cut into cores of
    ``max_seconds - 2 * context_seconds`` (rounded down to whole frames), each read with
    `context_seconds` on both sides, less where the file ends. For encoders of bounded context
    `context_seconds` has no say: their windows of at most `max_seconds` follow `Context`.
    """

    max_seconds: float
    context_seconds: float

    def __post_init__(self) -> None:
        if not (0 <= 2 * self.context_seconds < self.max_seconds < float("inf")):
            raise InputError(
                f"window rule max_seconds={self.max_seconds}, context_seconds={self.context_seconds}: "
                "max_seconds must be finite and more than twice context_seconds"
            )

    def max_samples(self, grid: FrameGrid) -> int:
        """Longest file (samples) that is encoded in one piece."""
        return int(self.max_seconds * grid.sample_rate)

    def context(self, grid: FrameGrid) -> int:
        """Frames of context on each side of a core."""
        return int(self.context_seconds * grid.rate)

    def core(self, grid: FrameGrid, context: Context | None = None) -> int:
        """Frames of a core: what each window adds to the result; whole chunks where the context is bounded.

        Raises
        ------
        InputError
            If nothing is left between the contexts.
        """
        core = grid.whole_frames(self.max_samples(grid))
        if context is None:
            core -= 2 * self.context(grid)
            sides = f"two contexts of {self.context_seconds} s"
        else:
            core = (core - context.left - context.right) // context.chunk * context.chunk
            sides = f"the encoder's context of {context.left} and {context.right} frames"
        if core < 1:
            raise InputError(f"max_seconds={self.max_seconds} leaves no frame between {sides}; make max_seconds longer")
        return core

    def windows(self, grid: FrameGrid, num_samples: int, *, emitted: int = 0, final: bool = True) -> Iterator[Window]:
        """Windows of a file, in order.

        Parameters
        ----------
        grid : FrameGrid
            The encoder's frames.
        num_samples : int
            Samples of the file, or those known so far.
        emitted : int
            Windows that were taken before (streams).
        final : bool
            False while more samples may come: then only windows are given that later
            samples cannot change.
        """
        if num_samples <= self.max_samples(grid):
            if final and emitted == 0:
                yield Window(0, None, 0, 0, grid.num_frames(num_samples))
            return
        total = grid.num_frames(num_samples) if final else grid.whole_frames(num_samples)
        core, context = self.core(grid), self.context(grid)
        index = emitted
        while index * core < total:
            first, last = index * core, min((index + 1) * core, total)
            if not final and first + core + context > total:
                return
            begin, end = max(0, first - context), min(total, last + context)
            yield Window(
                begin * grid.hop, grid.num_samples(end - begin) + begin * grid.hop, first, first - begin, last - first
            )
            index += 1
