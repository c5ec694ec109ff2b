"""A browser without a window, driven by a list of actions; runs with the Python that has PySide6.

    python browser.py light|dark < jobs.json > results.json

A job is {"html": path, "width": pixels, "do": [action, ...]}. An action is {"js": code}, whose
value is noted; {"key": name} as in Qt.Key, {"click": [x, y]} and {"move": [x, y]} in pixels of the
view; or {"shot": path}, a picture of the whole page. A result has "values", "console" (messages of
the page) and "requests" (addresses other than the page's own).
"""

import json
import os
import sys
import threading

LIMIT = 120  # seconds for all
PAUSE = 60  # milliseconds between actions
SETTLE = 400  # milliseconds after a change of size

threading.Timer(LIMIT, lambda: os._exit(9)).start()
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # Chromium's own needs rights that CI lacks
scheme = {"light": 1, "dark": 0}[sys.argv[1]]
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
    "--no-sandbox --disable-gpu --force-device-scale-factor=1 --font-render-hinting=none "
    f"--hide-scrollbars --blink-settings=preferredColorScheme={scheme}"
)

from PySide6.QtCore import QPoint, Qt, QTimer, QUrl  # noqa: E402
from PySide6.QtTest import QTest  # noqa: E402
from PySide6.QtWebEngineCore import (  # noqa: E402
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

HEIGHT = "document.documentElement.scrollHeight"


class Noted(QWebEngineUrlRequestInterceptor):
    """What a page asks for, besides itself; all of it is refused."""

    def __init__(self, own, found):
        super().__init__()
        self.own, self.found = own, found

    def interceptRequest(self, info):  # noqa: N802
        url = info.requestUrl()
        if url != self.own:
            self.found.append(url.toString())
            info.block(True)


class Page(QWebEnginePage):
    """A page whose messages are kept."""

    def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802
        self.messages.append(f"{line}: {message}")


class Run:
    """All jobs, one after the other; each step starts the next from Qt's event loop."""

    def __init__(self, app, jobs):
        self.app, self.jobs, self.results = app, jobs, []

    def next(self):
        if len(self.results) == len(self.jobs):
            sys.stdout.write(json.dumps(self.results))
            sys.stdout.flush()
            os._exit(0)  # Chromium's processes end slowly
        job = self.jobs[len(self.results)]
        self.result = {"values": [], "console": [], "requests": []}
        self.results.append(self.result)
        self.actions, self.width = list(job["do"]), job["width"]
        self.profile = QWebEngineProfile()
        self.view, url = QWebEngineView(), QUrl.fromLocalFile(os.path.abspath(job["html"]))
        self.noted = Noted(url, self.result["requests"])
        self.profile.setUrlRequestInterceptor(self.noted)
        self.page = Page(self.profile, self.view)
        self.page.messages = self.result["console"]
        self.view.setPage(self.page)
        self.view.resize(self.width, 900)
        self.view.show()
        self.view.setFocus()
        self.page.loadFinished.connect(lambda ok: QTimer.singleShot(SETTLE, self.act))
        self.page.load(url)

    def act(self):
        if not self.actions:
            self.view.hide()
            self.next()
            return
        ((kind, given),) = self.actions.pop(0).items()
        getattr(self, kind)(given)

    def then(self, pause=PAUSE):
        QTimer.singleShot(pause, self.act)

    def js(self, code):
        def noted(value):
            self.result["values"].append(json.loads(value))
            self.then()

        self.page.runJavaScript(f"JSON.stringify((()=>{{{code}}})()??null)", noted)

    def key(self, name):
        QTest.keyClick(self.view.focusProxy(), getattr(Qt.Key, f"Key_{name}"))
        self.then()

    def click(self, at):
        QTest.mouseClick(self.view.focusProxy(), Qt.LeftButton, pos=QPoint(*at))
        self.then()

    def move(self, at):
        QTest.mouseMove(self.view.focusProxy(), QPoint(*at))
        self.then()

    def shot(self, path):
        """Keep a picture once three in a row are equal: painting takes its time."""
        seen = []

        def grown(height):
            self.view.resize(self.width, int(height))
            QTimer.singleShot(SETTLE, look)

        def look():
            seen.append(self.view.grab().toImage())
            if len(seen) < 3 or not seen[-1] == seen[-2] == seen[-3]:
                QTimer.singleShot(SETTLE, look)
                return
            seen[-1].save(path)
            self.view.resize(self.width, 900)
            self.then(SETTLE)

        self.page.runJavaScript(HEIGHT, grown)


app = QApplication(sys.argv[:1])
run = Run(app, json.load(sys.stdin))
QTimer.singleShot(0, run.next)
app.exec()
