"""Clips are decoded in a process of their own: what ends it costs one clip, not the run. Ours.

On damaged bytes a decoder may end its whole process (decord: std::bad_alloc), which no `except`
catches. `Reader` keeps one such process, starts another when it dies, and is what common/clips.py
asks. This file is also the script of that process, so it imports nothing slow.

    parent: (reader, path)      ->
                                <-  child: ("choose", frames in the clip, frames a second)
    parent: numbers of frames   ->                      (again if it was another number of frames)
                                <-  child: ("frames", uint8 (T, H, W, 3), numbers, frames a second)
"""

import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading

import numpy as np

PATIENCE = 600.0  # seconds without a word, after which the process is ended


class ReaderError(Exception):
    """A clip that this reader cannot read; the message says why."""


class Reader:
    """A process that decodes. Threads take turns; a process that is forked needs its own."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def read(self, name, path, choose):
        """Some frames of a clip -> uint8 (T, H, W, 3), their numbers, frames a second.

        name: one of READERS. choose(frames in the clip, frames a second) -> numbers. Raises
        ReaderError if it cannot be read, also where that ends the process.
        """
        with self.lock:
            try:
                self._send((name, os.path.abspath(path)))
                word, *rest = self._receive()
                while word == "choose":
                    self._send(choose(*rest))
                    word, *rest = self._receive()
            except TimeoutError:
                self.end()
                raise ReaderError(f"{name}: no answer in {PATIENCE:.0f} s") from None
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                raise ReaderError(f"{name}: {self._how_it_ended()}") from None
            except BaseException:  # such as Ctrl-C between question and answer
                self.end()
                raise
        if word == "fault":
            raise ReaderError(f"{name}: {rest[0]}")
        return rest

    def end(self):
        """End the process, if there is one."""
        if self.process:
            self.process.kill()
            self._how_it_ended()

    def _send(self, message):
        if self.process is None:
            command = [sys.executable, "-P", os.path.abspath(__file__)]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def _receive(self):
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            raise TimeoutError
        return pickle.load(self.process.stdout)

    def _how_it_ended(self):
        process, self.process = self.process, None
        process.stdin.close()
        process.stdout.close()
        code = process.wait(timeout=60)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"it ended the reading process ({cause})"


# ------------------------------------------------------------------------------- in that process


def decord(path, choose):
    """As `Reader.read`, by decord."""
    import decord

    clip = decord.VideoReader(path, num_threads=1)
    if not len(clip):
        raise ReaderError("no frames")
    clock = clip.get_frame_timestamp(np.arange(len(clip)))[:, 0]  # (frames,) seconds
    if clock[0] < 0 or (np.diff(clock) <= 0).any() or 0 not in clip.get_key_indices():
        # it would count hidden frames, or mix the order up
        raise ReaderError("cut by stream copy")
    fps = _rate(clip.get_avg_fps())
    numbers = choose(len(clip), fps)
    return clip.get_batch(numbers).asnumpy(), numbers, fps


def pyav(path, choose):
    """As `Reader.read`, by PyAV: a clip is decoded once, unless it holds other frames than its
    packets promise.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        fps = _rate(stream.average_rate or 0)
        total = sum(_is_shown(packet) for packet in container.demux(stream))
    for _ in range(2):
        numbers = choose(total, fps) if total else []
        promised, (total, pictures) = total, _decode(path, {*numbers})
        if total == promised:
            break
    if not total:
        raise ReaderError("no frames")
    return np.stack([pictures[i] for i in numbers]), numbers, fps


def _decode(path, wanted):
    """-> how many frames are shown, {number: uint8 (H, W, 3)} of those that are wanted."""
    import av

    total, pictures = 0, {}
    with av.open(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.time is not None and frame.time < 0:
                continue  # a cut by stream copy keeps some before time 0 for the decoder
            if total in wanted:
                pictures[total] = frame.to_ndarray(format="rgb24")
            total += 1
    return total, pictures


def _is_shown(packet):
    """Whether a packet holds a frame that is seen. The last one of a stream is empty."""
    return packet.size > 0 and not packet.is_discard and (packet.pts is None or packet.pts >= 0)


def _rate(fps):
    """Frames a second, where a clip does not say: 24."""
    fps = float(fps)
    return fps if fps and math.isfinite(fps) else 24.0


READERS = dict(decord=decord, PyAV=pyav)


def serve(requests, replies):
    """Answer until the other side is gone. Whatever a damaged file provokes becomes a word."""

    def send(*message):
        pickle.dump(message, replies, protocol=5)
        replies.flush()

    def choose(total, fps):
        send("choose", total, fps)
        return pickle.load(requests)

    while True:
        try:
            name, path = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = "frames", *READERS[name](path, choose)
        except ImportError as e:
            answer = "fault", f"not installed ({e})"
        except ReaderError as e:
            answer = "fault", str(e)
        except Exception as e:
            last_line = str(e).strip().rpartition("\n")[2]
            answer = "fault", f"{type(e).__name__} {last_line:.100}"
        send(*answer)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not come between
    serve(sys.stdin.buffer, replies)
