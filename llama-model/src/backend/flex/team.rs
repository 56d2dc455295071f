//! The threads that share the work of an operation. They stay awake for a moment between two operations: a token takes
//! tens of rounds of a few microseconds to a few hundred each, and waking a sleeping thread (rayon's sleep at once) takes as
//! long as a whole round.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for the next round before it sleeps: longer than what a model does between two rounds, and
/// between two tokens.
const AWAKE: Duration = Duration::from_micros(500);
/// Looks at the next round between two looks at the clock, and before giving the processor away.
const LOOKS: usize = 256;

/// Runs `task(0)` to `task(tasks - 1)`, each once, on as many threads as rayon would. Each thread begins with a stretch of
/// its own, in order, so that what is fetched ahead of one task is the beginning of the next, and then helps the others.
///
/// A second caller at the same time runs its tasks alone.
pub(super) fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    static TEAM: OnceLock<Mutex<Team>> = OnceLock::new();
    if threads().min(tasks) > 1 {
        let team = TEAM.get_or_init(|| Mutex::new(Team::new(threads() - 1)));
        if let Ok(team) = team.try_lock() {
            return team.run(tasks, &task);
        }
    }
    (0..tasks).for_each(task);
}

/// Runs `task` for every item, each once, on all threads.
pub(super) fn each<T: Send>(mut items: impl Iterator<Item = T>, task: impl Fn(T) + Sync) {
    let Some(first) = items.next() else { return };
    let Some(second) = items.next() else { return task(first) };
    let items = [first, second].into_iter().chain(items);
    let items: Vec<Mutex<Option<T>>> = items.map(|item| Mutex::new(Some(item))).collect();
    for_each(items.len(), |index| {
        let item = items[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        item.into_iter().for_each(&task);
    });
}

/// The results of `task` for every item, in the order of the items.
pub(super) fn map<T: Send, R: Send>(items: impl Iterator<Item = T>, task: impl Fn(T) -> R + Sync) -> Vec<R> {
    let items: Vec<T> = items.collect();
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    each(items.into_iter().zip(&mut results), |(item, result)| *result = Some(task(item)));
    results.into_iter().flatten().collect()
}

/// Threads that share an operation's work.
pub(super) fn threads() -> usize {
    rayon::current_num_threads()
}

/// What the threads share. The caller writes the job while no member is `inside` and the round is closed.
struct Shared {
    /// Number of the round, so that a member joins each once.
    round: AtomicUsize,
    /// Whether the round still takes members.
    open: AtomicBool,
    /// Members that may be at the job.
    inside: AtomicUsize,
    /// Members that sleep, or are about to.
    asleep: AtomicUsize,
    /// For each thread, the caller first: how many tasks of its stretch are taken.
    taken: Box<[Counter]>,
    job: UnsafeCell<Job>,
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// On a cache line of its own.
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the job is written by the one caller (the team is behind a mutex) when no member can read it, and the task it
// points to may be called from any thread.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

struct Team {
    shared: Arc<Shared>,
    members: Vec<Thread>,
}

impl Team {
    fn new(members: usize) -> Self {
        let nothing: &(dyn Fn(usize) + Sync) = &|_| ();
        let shared = Arc::new(Shared {
            round: AtomicUsize::new(0),
            open: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            asleep: AtomicUsize::new(0),
            taken: (0..=members).map(|_| Counter(AtomicUsize::new(0))).collect(),
            job: UnsafeCell::new(Job { task: nothing, tasks: 0 }),
            panic: Mutex::new(None),
        });
        let member = |index: usize| {
            let shared = shared.clone();
            let thread = thread::Builder::new().name(format!("flex-{index}")).spawn(move || shared.serve(index + 1));
            // Fewer threads than asked for only make it slower.
            thread.ok().map(|handle| handle.thread().clone())
        };
        let members = (0..members).filter_map(member).collect();
        Self { shared, members }
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: the last round is closed and nobody is inside. The lifetime is forgotten: this function returns only
        // when no member can reach the task any more.
        unsafe {
            let task = std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task);
            *shared.job.get() = Job { task, tasks };
        }
        shared.taken.iter().for_each(|taken| taken.0.store(0, SeqCst));
        shared.open.store(true, SeqCst);
        shared.round.fetch_add(1, SeqCst);
        if shared.asleep.load(SeqCst) > 0 {
            self.members.iter().for_each(Thread::unpark);
        }
        shared.work(0);
        // A member that comes from here on finds the round closed; those that are inside end their tasks.
        shared.open.store(false, SeqCst);
        let mut looks = 0;
        while shared.inside.load(SeqCst) > 0 {
            looks += 1;
            if looks % LOOKS == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panic = shared.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    /// Takes tasks until there are none, first of this thread's stretch.
    fn work(&self, thread: usize) {
        // SAFETY: the round is open, or the caller is the one that opened it; the job does not change before it is over.
        let Job { task, tasks } = unsafe { *self.job.get() };
        let threads = self.taken.len();
        let run = || {
            for owner in (thread..threads).chain(0..thread) {
                let (start, end) = (owner * tasks / threads, (owner + 1) * tasks / threads);
                // Looked at first: a counter that is only read stays in everybody's cache.
                while self.taken[owner].0.load(SeqCst) < end - start {
                    let index = start + self.taken[owner].0.fetch_add(1, SeqCst);
                    if index < end {
                        // SAFETY: as above.
                        unsafe { (*task)(index) };
                    }
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(panic);
        }
    }

    /// A member's life.
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_round(seen);
            // First inside, then a look whether the round is open: the caller closes it first, then looks who is inside.
            self.inside.fetch_add(1, SeqCst);
            if self.open.load(SeqCst) {
                self.work(thread);
            }
            self.inside.fetch_sub(1, SeqCst);
        }
    }

    /// Waits for a round after `seen`, first awake, then asleep.
    fn next_round(&self, seen: usize) -> usize {
        let changed = || Some(self.round.load(SeqCst)).filter(|round| *round != seen);
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if let Some(round) = changed() {
                    return round;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > AWAKE {
                break;
            }
        }
        self.asleep.fetch_add(1, SeqCst);
        let round = loop {
            if let Some(round) = changed() {
                break round;
            }
            thread::park();
        };
        self.asleep.fetch_sub(1, SeqCst);
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_round() {
        let team = Team::new(3);
        for round in 0..20_000 {
            let counts: Vec<AtomicUsize> = (0..round % 40).map(|_| AtomicUsize::new(0)).collect();
            team.run(counts.len(), &|index| {
                counts[index].fetch_add(1, SeqCst);
            });
            assert!(counts.iter().all(|count| count.load(SeqCst) == 1), "round {round}");
            // Long enough for some to fall asleep.
            if round % 4000 == 0 {
                thread::sleep(4 * AWAKE);
            }
        }
    }

    #[test]
    fn several_callers_and_tasks_with_tasks_do_not_wait_for_each_other() {
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        for_each(8, |_| {
                            for_each(3, |_| {
                                total.fetch_add(1, SeqCst);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(SeqCst), 4 * 500 * 8 * 3);
    }

    #[test]
    fn items_are_taken_once_and_results_stay_in_order() {
        let mut numbers = vec![0usize; 1000];
        each(numbers.chunks_mut(7).enumerate(), |(index, chunk)| chunk.iter_mut().for_each(|x| *x += index));
        assert!(numbers.iter().enumerate().all(|(i, x)| *x == i / 7));
        assert_eq!(map(0..100, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(1);
        let caught = catch_unwind(AssertUnwindSafe(|| team.run(4, &|index| assert!(index != 2, "task two"))));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        team.run(4, &|_| {
            count.fetch_add(1, SeqCst);
        });
        assert_eq!(count.load(SeqCst), 4);
    }
}
