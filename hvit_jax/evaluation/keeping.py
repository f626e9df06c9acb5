"""When scored pictures are kept on disk, and whether to go on with those of an earlier run."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from hvit_jax.data.folder import PictureError
from hvit_jax.distributed.peers import NoPeers, Peers
from hvit_jax.distributed.together import gather
from hvit_jax.errors import InputError
from hvit_jax.evaluation.kept import Kept, folder_of, refuse_pictures
from hvit_jax.evaluation.lock import refuse_running
from hvit_jax.evaluation.options import Options
from hvit_jax.evaluation.tally import Tally
from hvit_jax.system.files import check_destination

# Results depend on these, or name one only. The batch and the number of devices may change.
_SAME = ("method", "args", "model", "resolution", "dtype", "device", "matmul_precision", "versions")
_SAME += ("attention", "unroll", "data_sha256", "checkpoint_sha256")


def check_files(options: Options) -> None:
    """Check that results can be written, and that none are lost, before the work starts.

    Raises:
        InputError: if they cannot, another evaluation is at it, or an earlier run left some, and it
            is not said what to do.
    """
    kept = options.output and folder_of(options.output)
    if kept is not None:
        refuse_running(kept)
    going_on = options.resume and kept is not None and kept.is_dir()
    for path in (options.output, options.predictions):
        if path is not None:
            check_destination(path, overwrite=options.overwrite or going_on)
    if kept is not None and not options.resume and not options.overwrite:
        refuse_pictures(kept)


class Keeper:
    """Keeps what has been scored beside the results, until these are written.

    Without --output, and in all processes but the first, it keeps nothing.
    """

    def __init__(
        self,
        options: Options,
        about: dict[str, Any],
        peers: Peers | NoPeers,
        messages: Console,
    ):
        """Say what to keep; nothing is read or written yet.

        Args:
            options: the command line.
            about: what the results say besides the scores.
            peers: the other processes.
            messages: where to say what becomes of it.
        """
        self._options, self._messages, self._kept = options, messages, None
        if options.output is not None and peers.index == 0:
            settings = {name: about[name] for name in _SAME}
            settings["predictions"] = options.predictions and str(options.predictions)
            self._kept = Kept(folder_of(options.output), settings)

    def begin(self, tally: Tally, count: int) -> None:
        """Go on with an earlier run, if that is wanted; all processes call this.

        Args:
            tally: gets what has been scored; in the other processes only how much.
            count: pictures in all.

        Raises:
            InputError: if it was of something else, another evaluation is at it, or nothing can be
                kept.
        """
        if self._kept is not None:
            check_files(self._options)  # Another evaluation may have come and gone meanwhile.
            try:
                self._take(self._kept, tally, count)
            except BaseException:
                self._kept.release()
                raise
        tally.first = gather(tally.first)[0]

    def _take(self, kept: Kept, tally: Tally, count: int) -> None:
        if self._options.resume and kept.exists():
            kept.restore(tally)
            self._check_skipped(tally)
            done = tally.totals.pictures
            self._messages.print(f"going on: {done} of {count} pictures were scored before")
        else:
            if self._options.resume:
                self._messages.print("nothing to go on with: this is the beginning")
            kept.begin(overwrite=self._options.overwrite)

    def _check_skipped(self, tally: Tally) -> None:
        if tally.skipped and self._options.on_error != "skip":
            raise PictureError(f"{tally.skipped[0]}; --on-error skip goes on without it")

    def keep(self, tally: Tally) -> None:
        """Save now and then; a full disk does not stop the evaluation."""
        if self._kept is not None and self._kept.due():
            self.save(tally)

    def save(self, tally: Tally) -> None:
        """Save what has been scored."""
        if self._kept is not None:
            try:
                self._kept.save(tally)
            except InputError as error:
                self._messages.print(f"{error}; a run that is killed loses more")

    def leave_nothing(self) -> None:
        """Remove the folder, unless an earlier run had scored something; nothing is kept later."""
        if self._kept is not None:
            if self._kept.empty():
                self._kept.remove()
            self._kept.release()

    def finish(self) -> None:
        """Remove what was kept: the results are written."""
        if self._kept is not None:
            self._kept.remove()
