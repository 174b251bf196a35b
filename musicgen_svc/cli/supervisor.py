"""Keeps a Cog server running behind the gate: starts it, watches it, and restarts it after a fault."""

import asyncio
import time
from collections.abc import Awaitable

from musicgen_svc.cli.cog_log import Console, sentence
from musicgen_svc.cli.cog_server import CogServer
from musicgen_svc.cli.gate import Gate
from musicgen_svc.cli.watch import Fault, Observation, Restarts, Watch
from musicgen_svc.runtime.json_object import Json

ANSWERS_S = 5.0
"""How long Cog may take to send its answers when the server is stopped and no prediction runs any more."""
SETTLE_S = 1.0
"""How long Cog keeps running after the last prediction has ended, so that it can send the webhook."""
RESTART_GRACE_S = 60.0
"""How long running predictions may take to end before a restart that waits for them."""
SET_UP_WATCH_S, WATCH_S = 0.1, 1.0
"""How often a server is looked at, during set-up and after it."""
SET_UP = ("READY", "BUSY", "UNHEALTHY", "DEFUNCT")
"""Health of a server that has been set up, whether it works or not."""


class StopRequest:
    """Whether the server was told to stop. After a second call it no longer waits for running predictions."""

    def __init__(self, grace_s: float) -> None:
        """Makes it. `grace_s`: how long running predictions may take to end after the first call."""
        self.grace_s = grace_s
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def __call__(self) -> None:
        """Tells the server to stop."""
        (self.hurried if self.asked.is_set() else self.asked).set()


class Supervisor:
    """Runs one Cog server after another until it is told to stop."""

    def __init__(self, url: str, more: list[str], gate: Gate, console: Console, stop: StopRequest) -> None:
        """Makes a supervisor.

        Args:
            url: by which clients reach the gate.
            more: arguments for Cog.
            gate: in front of the Cog server.
            console: for the log.
            stop: set when the server is told to stop.
        """
        self._url = url
        self._more = more
        self._gate = gate
        self._console = console
        self._stop = stop
        self._restarts = Restarts()

    async def run(self) -> int:
        """Runs until no process of Cog's is left. Returns 0 if told to stop, or else Cog's exit status."""
        first = True
        while True:
            server = await CogServer.start(self._more, self._console)
            self._gate.relay_to(server.port, server.folders)
            try:
                fault = await self._serve(server, first)
                if fault is not None:
                    await self._prepare_restart(server, fault)
            finally:
                if self._stop.asked.is_set():
                    await self._drain(server)
                await server.end()
            if self._stop.asked.is_set():
                return 0
            if fault is None:
                return server.exit_status or 0
            first = False

    async def _drain(self, server: CogServer) -> None:
        """Refuses new predictions and those that wait, and gives those that run a grace to end.

        Returns when Cog has ended, when the grace is over, or when the server was told to stop again.
        """
        self._gate.drain()
        server.drain()
        told_again = self._stop.hurried
        if count := len(server.log.running):
            self._console.say(
                f"Stopping when the predictions that run ({count}) have ended, or after "
                f"{self._stop.grace_s:g} s. A second Ctrl-C or SIGTERM ends them at once."
            )
            grace = asyncio.sleep(self._stop.grace_s)
            await _first(server.log.idle.wait(), server.wait(), told_again.wait(), grace)
            if server.log.running:
                return
            await _first(server.wait(), told_again.wait(), asyncio.sleep(SETTLE_S))
        else:
            self._console.say("Stopping ...")
        server.stop()
        await _first(server.wait(), told_again.wait(), asyncio.sleep(ANSWERS_S))

    async def _serve(self, server: CogServer, first: bool) -> Fault | None:
        """Waits until the server must be restarted.

        There is no restart after a failure of the first set-up, because the next one would fail too. The
        server then keeps running, and its health check tells the reason.

        Returns:
            Fault: why it must be restarted. None: it was told to stop, or has ended by itself.
        """
        watching = asyncio.create_task(self._watch(server, first))
        await _first(watching, server.wait(), self._stop.asked.wait())
        if self._stop.asked.is_set():
            return None
        if not watching.cancelled():
            return watching.result()
        if server.exit_status and (server.was_ready or not first):
            return Fault(f"it ended with status {server.exit_status}")
        return None

    async def _watch(self, server: CogServer, first: bool) -> Fault:
        """Reports set-up and the server's URL. Returns at the first fault."""
        start_s = time.monotonic()
        watch = Watch()
        announced = False
        while True:
            health = await server.health()
            if health is not None and not announced:
                self._console.say(f"Setting up {self._url} ...")
                announced = True
                if first:
                    self._gate.open()  # Cog itself answers clients that set-up has not ended
            status = (health or {}).get("status")
            if status == "SETUP_FAILED":
                return await self._failed_set_up(health or {}, first)
            if status in SET_UP and not server.was_ready:
                server.was_ready = True
                self._gate.open()
                took_s = time.monotonic() - start_s
                self._console.say(f"Ready after {took_s:.1f} s: {self._url} (Ctrl-C stops it)")
            if announced:
                seen = Observation(health, server.places, len(server.log.lost), server.log.running)
                if (fault := watch.fault(time.monotonic(), seen)) is not None:
                    return fault
            await asyncio.sleep(WATCH_S if server.was_ready else SET_UP_WATCH_S)

    async def _failed_set_up(self, health: Json, first: bool) -> Fault:
        """Reports why set-up failed. Waits for ever after the first set-up; otherwise returns a fault."""
        reason = sentence(str(health.get("setup", {}).get("logs", "")))
        if not first:
            return Fault(f"its set-up failed: {reason.rstrip('.')}")
        self._console.say(f"Setup failed: {reason} (The server stays up to say so; Ctrl-C stops it.)")
        await asyncio.Event().wait()
        raise AssertionError

    async def _prepare_restart(self, server: CogServer, fault: Fault) -> None:
        """Reports why there is a restart, and waits until it is due and, if possible, no prediction runs."""
        delay_s = self._restarts.delay_s(time.monotonic(), fault)
        when = f" in {delay_s:.0f} s" if delay_s >= 1 else ""
        self._console.say(f"Cog's server is restarted{when}: {fault.reason}.")
        if fault.serves:
            worse = asyncio.create_task(self._worse(server))
            await _first(asyncio.sleep(delay_s), worse, server.wait(), self._stop.asked.wait())
            if not worse.cancelled():  # `_first` cancels those that have not ended
                fault = worse.result()
        else:
            self._gate.close()
            await _first(asyncio.sleep(delay_s), self._stop.asked.wait())
        self._gate.close()
        if fault.serves:
            idle = server.log.idle.wait()
            await _first(idle, asyncio.sleep(RESTART_GRACE_S), server.wait(), self._stop.asked.wait())

    async def _worse(self, server: CogServer) -> Fault:
        """Returns the first fault beside lost places, without which the server still serves."""
        watch = Watch()
        while True:
            seen = Observation(await server.health(), server.places, 0, server.log.running)
            if (fault := watch.fault(time.monotonic(), seen)) is not None:
                self._console.say(f"Cog's server is restarted now: {fault.reason}.")
                return fault
            await asyncio.sleep(WATCH_S)


async def _first(*awaitables: Awaitable[object]) -> None:
    """Waits until one of them has ended, and cancels the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
