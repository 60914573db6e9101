"""The end of a process, whatever holds it up: each in a process of its own."""

import subprocess
import sys
import textwrap

WAIT_S = 60


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process whose main thread waits for ever."""
    whole = f"""
import logging, os, threading, time
from concurrent.futures import ThreadPoolExecutor
from service.ending import Ending
ending = Ending(0.1, lambda: 3)
ending.start()
{textwrap.dedent(code)}
threading.Event().wait()
"""
    command = [sys.executable, "-c", whole]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_what_is_not_closed_in_time_is_left():
    ended = run("ending.begin()")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "closing took over 0.1 s: the process ends" in ended.stderr


def test_who_insists_is_heard_at_once():
    ended = run("ending._patience_s = 1000; ending.begin(); ending.begin()")
    assert ended.returncode == 3
    assert "a second signal came: the process ends" in ended.stderr


def test_a_process_that_closed_in_time_goes_on():
    ended = run("ending.begin(); ending.done(); time.sleep(0.5); os._exit(5)")
    assert (ended.returncode, ended.stderr) == (5, "")


def test_a_thread_of_a_pool_does_not_hold_up_the_end():
    ended = run("ThreadPoolExecutor(1).submit(threading.Event().wait); ending.begin(); exit()")
    assert ended.returncode == 3


def test_a_log_that_hangs_does_not_hold_up_the_end():
    ended = run(
        """
        class Hanging(logging.Handler):
            def emit(self, record):
                threading.Event().wait()

        logging.getLogger().addHandler(Hanging())
        ending.begin()
        """
    )
    assert ended.returncode == 3


def test_a_code_that_cannot_be_told_is_1():
    ended = run("ending._exit_code = threading.Event().wait; ending.begin()")
    assert ended.returncode == 1
