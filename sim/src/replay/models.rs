//! Models of work that others have fitted to recorded logs: what a rule does with them was not seen when it was made.

use muster_core::time::Millis;

use super::synthetic::Task;
use crate::rng::Rng;

/// Jobs of a parallel machine with so many processors, an array of as many tasks each: U. Lublin and D. G. Feitelson, "The
/// workload on parallel supercomputers: modeling the characteristics of rigid jobs", JPDC 63(11), 2003; all jobs as one
/// class. The day begins at its busiest half.
pub(super) fn rigid_jobs(span: Millis, processors: u32, rng: &mut Rng) -> Vec<Task> {
    let pace = day_pace();
    let mut tasks = Vec::new();
    let mut at = 0.0;
    loop {
        at = later(at, gamma(10.230_3, 0.487_1, rng).min(GAP_LOG_MAX).exp() / RUSH_TO_ALL, &pace);
        if at * 1_000.0 >= span.0 as f64 {
            return tasks;
        }
        let processors = size(processors, rng);
        let run = run_seconds(processors, rng);
        tasks.push(Task { at: millis(at), run: millis(run), tasks: processors });
    }
}

/// Arrivals of the rush hours to those of all hours.
const RUSH_TO_ALL: f64 = 1.022_5;
/// The model's own cut of gaps and run times, as logarithms of seconds.
const GAP_LOG_MAX: f64 = 12.0;
const RUN_LOG_MAX: f64 = 12.0;
const SLOT_SECONDS: f64 = 1_800.0;
const SLOTS: usize = 48;

/// How busy each half hour of a day is, beside the mean.
fn day_pace() -> [f64; SLOTS] {
    let (shape, scale): (f64, f64) = (8.173_7, 3.963_1);
    let density = |slot: f64| slot.powf(shape - 1.0) * (-slot / scale).exp();
    let mut pace = [0.0; SLOTS];
    for (slot, part) in (0u8..).zip(&mut pace) {
        // What lies past a day counts to the next day's morning.
        *part = density(f64::from(slot) + 0.5) + density(f64::from(slot) + 48.5);
    }
    let mean = pace.iter().sum::<f64>() / 48.0;
    pace.map(|part| (part / mean).max(0.02))
}

/// The second that is a gap later, where a gap of a busy hour passes sooner.
fn later(mut at: f64, mut gap: f64, pace: &[f64; SLOTS]) -> f64 {
    loop {
        let slot = (at / SLOT_SECONDS).floor();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "less than 48, and no less than 0")]
        let pace = pace[(slot % 48.0) as usize];
        let end = (slot + 1.0) * SLOT_SECONDS;
        if at + gap / pace < end {
            return at + gap / pace;
        }
        gap -= (end - at) * pace;
        at = end;
    }
}

/// A quarter is serial, most of the others are powers of two; the logarithm is uniform in two stages.
fn size(most: u32, rng: &mut Rng) -> u32 {
    let kind = uniform(rng);
    if kind <= 0.244 {
        return 1;
    }
    let high = f64::from(most).log2();
    let middle = high - 2.5;
    let (from, to) = if uniform(rng) <= 0.86 { (0.8, middle) } else { (middle, high) };
    let log = from + (to - from) * uniform(rng);
    let log = if kind <= 0.244 + 0.576 { (log + 0.5).floor() } else { log };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
    let size = (log.exp2() + 0.5) as u32;
    size.clamp(1, most)
}

/// Short or long, the longer the more processors: a hyper-gamma distribution of the logarithm.
fn run_seconds(processors: u32, rng: &mut Rng) -> f64 {
    let is_short = uniform(rng) <= (-0.005_4 * f64::from(processors) + 0.78).clamp(0.0, 1.0);
    let log = if is_short { gamma(4.2, 0.94, rng) } else { gamma(312.0, 0.03, rng) };
    log.min(RUN_LOG_MAX).exp()
}

/// So much in so many pieces of time, in bursts of every length: each half of a span has the part `bias` of what the span
/// has, or the rest of it. M. Wang and others, "Data mining meets performance evaluation: fast algorithms for modeling bursty
/// traffic", ICDE 2002.
pub(super) fn b_model(total: f64, bias: f64, pieces: usize, rng: &mut Rng) -> Vec<u64> {
    let mut volumes = vec![total];
    while volumes.len() < pieces {
        volumes = volumes
            .into_iter()
            .flat_map(|volume| {
                let part = if rng.chance(500) { bias } else { 1.0 - bias };
                [volume * part, volume * (1.0 - part)]
            })
            .collect();
    }
    volumes.truncate(pieces);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
    let whole = volumes.into_iter().map(|volume| volume.round() as u64).collect();
    whole
}

/// G. Marsaglia and W. W. Tsang, "A simple method for generating gamma variables", ACM TOMS 26(3), 2000; for shapes above 1.
fn gamma(shape: f64, scale: f64, rng: &mut Rng) -> f64 {
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let normal = (-2.0 * uniform(rng).ln()).sqrt() * (std::f64::consts::TAU * uniform(rng)).cos();
        let root = 1.0 + c * normal;
        if root <= 0.0 {
            continue;
        }
        let v = root * root * root;
        if uniform(rng).ln() < 0.5 * normal * normal + d - d * v + d * v.ln() {
            return d * v * scale;
        }
    }
}

/// Above 0, at most 1.
fn uniform(rng: &mut Rng) -> f64 {
    rng.between(1, (1 << 53) + 1) as f64 / (1u64 << 53) as f64
}

fn millis(seconds: f64) -> Millis {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
    Millis((seconds * 1_000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gamma_number_has_its_mean_and_variance() {
        let mut rng = Rng::new(1);
        let numbers: Vec<f64> = (0..20_000).map(|_| gamma(4.2, 0.94, &mut rng)).collect();
        let mean = numbers.iter().sum::<f64>() / 20_000.0;
        let variance = numbers.iter().map(|number| (number - mean).powi(2)).sum::<f64>() / 20_000.0;
        assert!((mean - 4.2 * 0.94).abs() < 0.05, "{mean}");
        assert!((variance - 4.2 * 0.94 * 0.94).abs() < 0.15, "{variance}");
    }

    #[test]
    fn jobs_are_as_the_model_says() {
        let mut rng = Rng::new(1);
        let jobs = rigid_jobs(Millis(21 * 86_400_000), 128, &mut rng);
        let serial = jobs.iter().filter(|job| job.tasks == 1).count() * 100 / jobs.len();
        assert!((24..40).contains(&serial), "{serial} % are serial");
        assert!(jobs.iter().all(|job| (1..=128).contains(&job.tasks)));
        assert!(jobs.windows(2).all(|pair| pair[0].at <= pair[1].at));
    }

    #[test]
    fn bursts_lose_nothing_of_the_total() {
        let volumes = b_model(100_000.0, 0.7, 1_024, &mut Rng::new(1));
        let total: u64 = volumes.iter().sum();
        assert!((99_500..100_500).contains(&total), "{total}");
        assert!(volumes.iter().max() > Some(&1_000), "ten times the mean");
    }
}
