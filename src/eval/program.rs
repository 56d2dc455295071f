//! Programs that a model writes: whether they pass their tests.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

/// How long a program may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Runs a program (its first argument), with little memory, and leaves a file (its second) if it came to its end: a program that leaves early has
/// passed nothing.
const RUNNER: &str = "
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except (ImportError, ValueError):
    pass
program, end = sys.argv[1:]
source = open(program, encoding='utf-8').read()
sys.argv = [program]
exec(compile(source, program, 'exec'), {'__name__': 'program'})
open(end, 'w').close()
";

/// Whether each program ends without an error, several at a time. They run as this user may: it is for the caller to do this where they can do no harm.
pub(super) fn pass(python: &Path, programs: &[String]) -> io::Result<Vec<bool>> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(programs.len());
    thread::scope(|scope| {
        let part = |first: usize| {
            scope.spawn(move || {
                programs[first..].iter().step_by(threads).map(|program| passes(python, program)).collect()
            })
        };
        let parts: Vec<_> = (0..threads).map(part).collect();
        let join = |part: thread::ScopedJoinHandle<'_, io::Result<Vec<bool>>>| {
            part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let parts: Vec<Vec<bool>> = parts.into_iter().map(join).collect::<io::Result<_>>()?;
        Ok((0..programs.len()).map(|index| parts[index % threads][index / threads]).collect())
    })
}

fn passes(python: &Path, program: &str) -> io::Result<bool> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("program.py");
    let name = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let end = folder.path().join(name);
    std::fs::write(&path, program)?;
    let mut command = Command::new(python);
    command.args(["-I", "-c", RUNNER]).arg(&path).arg(&end).current_dir(folder.path()).env_clear();
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let deadline = Instant::now() + TIMEOUT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    Ok(status.is_some_and(|status| status.success()) && end.exists())
}

/// Unbiased estimate of the probability that one of `k` samples passes, of `n` of which `correct` do (Chen et al. 2021, equation 1).
pub(super) fn pass_at(k: usize, n: usize, correct: usize) -> f64 {
    match n - correct {
        failed if failed < k => 1.0,
        failed => 1.0 - (failed + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_the_share_of_choices_with_a_passing_one() {
        // All subsets of 5 samples, of which the first `correct` pass.
        for (correct, k) in [(0, 1), (1, 1), (1, 3), (2, 2), (3, 2), (3, 3), (5, 1)] {
            let chosen = (0u32..32).filter(|set| set.count_ones() as usize == k);
            let (mut all, mut passing) = (0, 0);
            for set in chosen {
                all += 1;
                passing += usize::from(set & ((1 << correct) - 1) != 0);
            }
            assert!((pass_at(k, 5, correct) - passing as f64 / all as f64).abs() < 1e-12, "{correct} {k}");
        }
    }

    #[test]
    fn programs_pass_fail_leave_early_and_run_for_ever() {
        let python = Path::new("python3");
        if Command::new(python).arg("--version").output().is_err() {
            eprintln!("skipped: there is no python3");
            return;
        }
        let programs = [
            "assert 1 + 1 == 2",
            "assert 1 + 1 == 3",
            "import os\nos._exit(0)",
            "raise SystemExit",
            "while True: pass",
            "this is no program",
            "print('x' * 1_000_000)\nassert __name__ != '__main__'",
        ]
        .map(String::from);
        let expected = [true, false, false, false, false, false, true];
        assert_eq!(pass(python, &programs).unwrap(), expected);
        assert!(pass(python, &[]).unwrap().is_empty());
        assert!(pass(Path::new("/no/python"), &programs).is_err());
    }
}
