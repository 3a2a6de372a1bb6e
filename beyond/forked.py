"""Forked: the processes of one machine, forked when all is prepared.

    python fedavg.py --processes 2

Algorithm 1 runs in all of them, with one thread each; data and compiled code are shared, not
copied. This process is the first one, so that main() returns the rows as ever. If a process dies,
all end.
"""
import _thread
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import warnings

import torch
import torch.distributed as dist

from beyond.processes import GROUP, Processes, connect, end
from options import fail

def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1

class Forked(Processes):
    """This process and its children."""
    died = None         # what has happened to a child, as text
    watcher = None      # the thread that waits for that
    ending = False      # whether the children are to end

    def __init__(self, args):
        super().__init__(args)
        # Where there is a GPU, autograd fails in the children of a process that has used it, even
        # on the CPU: after an earlier run, or where the step was compiled.
        self.forks = not torch.cuda.is_available()
        if not self.forks and (args.processes or 1) > 1:
            fail(f'--processes {args.processes}: a machine with a GPU cannot fork them; start them '
                 f'by torchrun --nproc_per_node={args.processes}', everyone=True)
        self.size = args.processes or (min(cores(), self.most()) if self.forks else 1)
        self.threads, self.children = torch.get_num_threads(), []

    def load(self, state):
        super().load(state)
        if state and self.forks and not self.args.processes:    # the same number, the same bits
            self.size = state['processes']
            if type(self.size) is not int or self.size < 1:
                raise ValueError(f'{self.size!r} is not a number of processes')

    def prepare(self):
        if self.size > 1 and not hasattr(os, 'fork'):
            fail(f'--processes {self.size}: this system cannot fork; take --processes 1')
        if self.size > 1:
            torch.set_num_threads(1)        # a child cannot have more, nor code compiled for it
        try:
            super().prepare()
        finally:
            torch.set_num_threads(self.threads)

    def idle(self):
        return super().idle() | ({'Forked', 'Processes'} if self.size == 1 else set())

    def launch(self, algorithm):
        if self.size == 1:
            return super().launch(algorithm)
        torch.set_num_threads(1)
        context = multiprocessing.get_context('fork')
        before = signal.getsignal(signal.SIGINT)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)     # of fork beside threads
            store = os.path.join(folder, 'store')
            try:
                for rank in range(1, self.size):
                    child = context.Process(target=self.child, args=(algorithm, rank, store),
                                            daemon=True)
                    try:
                        child.start()
                    except OSError as e:
                        fail(f'--processes {self.size}: process {rank} could not be started ({e}); '
                             'give fewer')
                    self.children.append(child)
                self.watch()
                self.connect(store)
                return super().launch(algorithm)
            except self.Stop as stop:       # after the last round, as --personal trains
                line, code = stop.args
                print(line, file=sys.stderr)
                sys.exit(code)
            finally:
                self.ending = True
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGINT, before)
                self.end_children()

    def connect(self, store):
        """Joins the others, which find each other by a file."""
        connect('gloo', dist.FileStore(store, self.size), self.rank, self.size)
        GROUP['broken'] = self.broken

    def end_children(self):
        """Ends the children, if they have not ended, and sets back what was changed for them."""
        GROUP.clear()
        torch.set_num_threads(self.threads)
        for child in self.children:
            child.kill()
            child.join()
        if self.watcher:
            self.watcher.join()     # if it freed tensors while Python ends, torch would abort
        if dist.is_initialized():
            dist.destroy_process_group()

    #################################### A child ####################################

    def child(self, algorithm, rank, store):
        """What a child does: it runs the algorithm as process `rank`, and ends with its parent."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        sys.stdout = open(os.devnull, 'w')
        torch.set_num_threads(1)
        self.rank, self.children = rank, []
        self.connect(store)
        try:
            super().launch(algorithm)
        except SystemExit:          # with the parent's exit code
            pass
        os._exit(0)

    ################################ When one has gone ################################

    def watch(self):
        """Raises Stop in the main thread if a child dies."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.interrupted)
        watcher = threading.Thread(target=self.wait_for_death, daemon=True)
        watcher.start()
        self.watcher = watcher

    def wait_for_death(self):
        """Waits until a child dies before its time; ends the others then, and interrupts this
        process."""
        waiting = {child.sentinel: child for child in self.children}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                child = waiting.pop(sentinel)
                child.join()
                if child.exitcode and not self.ending:
                    rank = 1 + self.children.index(child)
                    if child.exitcode != -signal.SIGINT:        # Ctrl-C is for all of them
                        self.died = f'process {rank} has ended with exit code {child.exitcode}'
                    if not GROUP:       # this process waits for it, where no signal reaches it
                        end(f'{self.died or "interrupted"}; no round has begun')
                    _thread.interrupt_main()
                    return

    def interrupted(self, *_):
        """Ctrl-C, or the death of a child."""
        if self.died:
            raise self.Stop(f'{self.died}; all processes end, and the last round is kept', 3)
        self.ending = True      # Ctrl-C is for the children too, whose end is no news
        raise KeyboardInterrupt

    def broken(self):
        """What processes did together has failed. In a child, that is not worth a line."""
        if self.rank:
            os._exit(1)
        time.sleep(1)       # wait_for_death, or Ctrl-C, says more
        raise self.Stop('another process has gone', 3)

    def finish(self, code):
        if code == 130 or self.died or code and not all(c.is_alive() for c in self.children):
            self.ending = True
            GROUP.clear()       # there is nobody to talk to
        code = super().finish(code)
        self.ending = True
        return code

def end_with(parent):
    """Ends this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)
