//! The fuzz targets on their kept corpus and on mutations of it, on the stable compiler: what libFuzzer once found stays
//! found. `MASTIO_FUZZ_SECONDS` mutates for so long a target instead of a fixed number of times.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Mutations of a corpus, where nobody asks for more.
const MUTATIONS: usize = 5_000;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(fuzz().join("corpus").join(target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Small, fast, and the same at every run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(sides.max(1)).unwrap()).unwrap()
    }
}

/// What stands in the way of parsers more often than random bytes do.
const WORDS: [&[u8]; 18] = [
    b"\"",
    b"{",
    b"}",
    b"[[",
    b"\\u0000",
    b"1e999",
    b"-0",
    b"9007199254740993",
    b".",
    b"=",
    b"null",
    b"\xff\xfe",
    b"\x30\x80",
    b"\x30\x84\xff\xff\xff\xff",
    b"\x02\x00",
    b"\0",
    b"\r\n",
    b"-----BEGIN CERTIFICATE-----\n",
];

fn mutate(seeds: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let mut data = seeds[dice.roll(seeds.len())].clone();
    for _ in 0..=dice.roll(4) {
        let at = dice.roll(data.len() + 1);
        match dice.roll(7) {
            0 if !data.is_empty() => {
                let at = dice.roll(data.len());
                data[at] ^= 1 << dice.roll(8);
            }
            1 if !data.is_empty() => {
                let at = dice.roll(data.len());
                data[at] = u8::try_from(dice.roll(256)).unwrap();
            }
            2 => data.truncate(at),
            3 => {
                let word = WORDS[dice.roll(WORDS.len())];
                data.splice(at..at, word.iter().copied());
            }
            4 => {
                let other = &seeds[dice.roll(seeds.len())];
                let from = dice.roll(other.len() + 1);
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
            5 => {
                let until = (at + dice.roll(16)).min(data.len());
                data.drain(at..until);
            }
            _ => {
                let until = (at + dice.roll(32)).min(data.len());
                let part = data[at..until].to_vec();
                data.splice(at..at, part);
            }
        }
    }
    data
}

#[test]
fn every_target_has_a_corpus_and_an_entry_for_libfuzzer() {
    for (name, _) in targets::TARGETS {
        assert!(!corpus(name).is_empty(), "{name}");
        assert!(fuzz().join(format!("fuzz_targets/{name}.rs")).is_file(), "{name}");
        let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}

#[test]
fn the_corpus_and_mutations_of_it_break_nothing() {
    let seconds: Option<u64> =
        std::env::var("MASTIO_FUZZ_SECONDS").ok().map(|text| text.parse().expect("whole seconds"));
    for (number, (name, target)) in targets::TARGETS.into_iter().enumerate() {
        let seeds = corpus(name);
        seeds.iter().for_each(|seed| targets::run(name, seed));
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ u64::try_from(number).unwrap());
        let (began, mut tried) = (Instant::now(), 0);
        let on = |tried: usize| match seconds {
            Some(seconds) => began.elapsed() < Duration::from_secs(seconds),
            None => tried < MUTATIONS,
        };
        while on(tried) {
            target(&mutate(&seeds, &mut dice));
            tried += 1;
        }
        println!("{name}: {} seeds, {tried} mutations, {:?}", seeds.len(), began.elapsed());
    }
}
