"""The barrier of the kernels: nobody passes before all have come, and nobody sleeps for ever."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gptsmith.kernels import build

PROGRAM = r"""
#include "barrier.h"
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { THREADS = 5, ROUNDS = 4000 };
static barrier meeting;
static int64_t arrived[THREADS];

static void *run(void *argument) {
    int64_t thread = (int64_t)argument;
    for (int64_t round = 1; round <= ROUNDS; round++) {
        if ((round * 7 + thread) % 97 == 0) usleep(300); /* longer than the others spin */
        __atomic_store_n(&arrived[thread], round, __ATOMIC_RELAXED);
        wait_for_all(&meeting, THREADS);
        for (int i = 0; i < THREADS; i++)
            if (__atomic_load_n(&arrived[i], __ATOMIC_RELAXED) < round) exit(3);
    }
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    for (int64_t i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, run, (void *)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    return 0;
}
"""


def test_no_thread_passes_before_all_have_come(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    source, program = tmp_path / "meeting.c", tmp_path / "meeting"
    source.write_text(PROGRAM)
    command = [compiler, "-std=gnu11", "-O2", "-pthread", f"-I{build.HERE}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    assert subprocess.run([str(program)], timeout=120).returncode == 0
