"""The widget of a live view, and what the person has in hand. Nothing of a message is ever in a trait: traits are saved in notebooks."""

from __future__ import annotations

import contextvars
import json
import logging
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anywidget
from IPython.core.getipython import get_ipython
from IPython.display import display

from broker_nb.errors import BrokerError, ErrorKind, one_line
from broker_nb.portable.loop import shared_loop
from broker_nb.widgets.model import LiveModel

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("broker_nb")

STATIC = pathlib.Path(__file__).parent / "static"
MAX_MESSAGE = 64 << 10


class LiveWidget(anywidget.AnyWidget):
    """Carries messages between the model's loop and the page; decides nothing."""

    _esm = STATIC / "live.js"
    _css = STATIC / "live.css"

    def __init__(self, model: LiveModel) -> None:
        super().__init__()
        # A kernel with subshells answers a page where it was last spoken to from: a push in the context of the page's own message
        # keeps its clicks away from the shell that runs cells, so that they work while one is busy.
        self._context = contextvars.copy_context()
        self._model = model
        self.on_msg(self._heard)

    def __repr__(self) -> str:
        return one_line(f"(the live view of {self._model.name}: it needs its kernel)")  # shown where no page can draw it

    def _heard(self, widget: object, content: object, buffers: object) -> None:
        """On a thread of the kernel's choice, so only handed over."""
        del widget, buffers
        self._context = contextvars.copy_context()
        try:
            small = len(json.dumps(content)) <= MAX_MESSAGE
        except (TypeError, ValueError):
            small = False
        if small:
            shared_loop().loop.call_soon_threadsafe(self._model.receive, content)

    def push(self, content: dict[str, Any], buffers: list[bytes]) -> None:
        """Send to every page; on the loop thread."""
        try:
            self._context.copy().run(self.send, content, buffers)
        except Exception as error:  # noqa: BLE001 (whatever the kernel's sockets raise while it ends; the page asks again)
            log.warning("live %s: not sent to the page: %s", self._model.name, error)


class LiveView:
    """What `conn.live` returns: the open view. It is shown by itself, and again where it is a cell's value."""

    def __init__(self, model: LiveModel, say: Callable[[str], None]) -> None:
        self._model, self._say = model, say
        self._widget: LiveWidget | None = LiveWidget(model)
        self._displays: list[str] = []
        self._shown_in: object = None
        model.send = self._widget.push
        model.on_end.append(self._end)

    @property
    def name(self) -> str:
        """Topic, or topic/subscription."""
        return self._model.name

    @property
    def is_open(self) -> bool:
        """Whether it still takes and shows."""
        return self._model.is_open

    def frame(self) -> pd.DataFrame:
        """What the view has, held rows first. Effect on the broker: none.

        Returns
        -------
        The frame of `sample` with `state` str per row and, where rows were taken, `lease` str: `conn.ack(view.frame())` works. Rows
        that left the view are counted in `broker_nb.report(df)`, and make `df.attrs["complete"]` false.
        """
        frame, line = shared_loop().run(_frame(self._model))
        self._say(line)
        return frame

    def close(self) -> None:
        """Give back what it holds, and leave a line of text in its place. Idempotent."""
        shared_loop().run(_close(self._model))

    stop = close

    def show(self) -> None:
        """Show it here, below a plain line that stays when the notebook is opened again without this kernel."""
        self._shown_in = _cell()
        _line(f"live {self.name} | opened {self._model.opened:%H:%M:%S} UTC" if self.is_open else repr(self))
        if self._widget is not None:
            handle = display(self._widget, display_id=True)
            self._displays.append(handle.display_id)

    def _ipython_display_(self) -> None:
        if self._shown_in is None or self._shown_in != _cell():  # else the cell that opened it shows it already
            self.show()

    def __repr__(self) -> str:
        return one_line(self._model.line())

    def _end(self, line: str) -> None:
        """The model has ended; on the loop thread."""
        widget, self._widget = self._widget, None
        for display_id in self._displays:
            _line(line, display_id)
        if widget is not None:
            widget.close()


def show(model: LiveModel, say: Callable[[str], None]) -> LiveView:
    """Show a model's view, made when it is first shown."""
    view = model.shown_by
    if not isinstance(view, LiveView):
        view = model.shown_by = LiveView(model, say)
    view.show()
    return view


def check_notebook() -> None:
    """Raise where no page could show a view.

    Raises
    ------
    BrokerError
        UNSUPPORTED, one line with what to use instead.
    """
    if getattr(get_ipython(), "kernel", None) is None:
        text = "live: works in a notebook (JupyterLab, Notebook 7); here use consume, or sample to look"
        raise BrokerError(ErrorKind.UNSUPPORTED, "live", text)


async def _frame(model: LiveModel) -> tuple[pd.DataFrame, str]:
    from broker_nb.frames.read import live_frame

    dropped = model.rows.dropped
    parts, states = model.batches()
    frame: pd.DataFrame = await live_frame(parts, states, model.name, dropped)
    held = f" | {len(model.rows.pinned):,} held" if model.rows.pinned else ""
    left = f" | {dropped:,} older ones have left the view" if dropped else ""
    return frame, f"live {model.name} | {len(frame):,} messages{held}{left}"


async def _close(model: LiveModel) -> None:
    await model.close()


def _cell() -> object:
    return getattr(get_ipython(), "execution_count", None)


def _line(text: str, display_id: str | None = None) -> None:
    bundle = {"text/plain": one_line(text, 1000)}
    if display_id is None:
        display(bundle, raw=True)
    else:
        display(bundle, raw=True, display_id=display_id, update=True)
