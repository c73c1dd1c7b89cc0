"""Which of the jobs in flight kills the engine's process."""

from __future__ import annotations

from collections.abc import Mapping

from handler.engine.ticket import Ticket


class Suspicion:
    """Finds the job that kills the process, without failing any other.

    After a first death all jobs are retried together: most deaths have nothing to do with a job. If one of them is at
    work at a second death, a search by halves starts. One half of the suspects is given to the process and the other
    half waits. A half that finishes is innocent; if the process dies, the half is halved again. A single suspect runs
    alone, so a death then is its own, and the search ends. With n suspects this takes log2(n) deaths.

    Jobs that were at no death yet run beside halves of more than one, so that a search holds up no newcomer for long.

    Args:
        tickets: the jobs in flight by key, in order of arrival; the engine adds and removes them.
    """

    def __init__(self, tickets: Mapping[str, Ticket]) -> None:
        self._tickets = tickets
        self._groups: list[list[str]] = []  # of suspects; the last one is on trial, the others wait

    def may_run(self, key: str) -> bool:
        """Whether the process may be given this job now."""
        group = self._on_trial()
        if len(group) == 1:
            return key in group and not any(ticket.sent for ticket in self._tickets.values())
        return not group or key in group or self._tickets[key].deaths == 0

    def after_death(self) -> str | None:
        """Learns from a death, before any ticket is changed; the key of the job that is certain to have caused it."""
        sent = [key for key, ticket in self._tickets.items() if ticket.sent]
        # If no job was at work, the process died of taking one in, which can be any that it was given.
        suspects = [key for key in sent if self._tickets[key].at_work] or sent
        for key in suspects:
            self._tickets[key].deaths += 1
        if len(sent) == 1 and self._tickets[sent[0]].deaths > 1:
            self._groups.clear()  # without it the others may run together again
            return sent[0]
        if group := self._on_trial():
            tried = [key for key in group if key in suspects]
            if tried:
                self._groups[-1] = [key for key in group if key not in tried]
                self._halve(tried)
        elif any(self._tickets[key].deaths > 1 for key in suspects):
            self._halve(suspects)
        return None

    def _on_trial(self) -> list[str]:
        """The suspects that may run now, those that have left excluded; empty if there is no search."""
        while self._groups:
            if group := [key for key in self._groups[-1] if key in self._tickets]:
                return group
            self._groups.pop()
        return []

    def _halve(self, suspects: list[str]) -> None:
        middle = len(suspects) // 2
        self._groups += [suspects[middle:], suspects[:middle]]
