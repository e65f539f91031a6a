//! Compiles the device rules of an OCI spec into the BPF program by which cgroup v2 decides on each mknod
//! and open of a device (`BPF_PROG_TYPE_CGROUP_DEVICE`; `struct bpf_cgroup_dev_ctx` in linux/bpf.h).

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Error, Result};
use crate::sys::BpfInstruction;

/// The most rules a spec may have; each costs at most eight instructions, and the kernel takes a million.
const MAX_RULES: usize = 4096;

/// `BPF_DEVCG_DEV_BLOCK`, `BPF_DEVCG_DEV_CHAR`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_MKNOD`, `_READ`, `_WRITE`.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// What every container may use, as runc allows it: making any node, and the nodes that do no harm.
const ALWAYS_ALLOWED: [Rule; 10] = [
    Rule { allow: true, kind: Some(CHARACTER), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(BLOCK), major: None, minor: None, access: MKNOD },
    Rule::character(1, Some(3)),
    Rule::character(1, Some(5)),
    Rule::character(1, Some(7)),
    Rule::character(1, Some(8)),
    Rule::character(1, Some(9)),
    Rule::character(5, Some(0)),
    Rule::character(5, Some(2)),
    Rule::character(136, None),
];

/// Registers: the result, the context, and where the program keeps its fields.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Operation codes of linux/bpf_common.h and linux/bpf.h, composed.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d; // BPF_JMP | BPF_JNE | BPF_X
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// One rule in the kernel's terms; nothing stands for any.
#[derive(Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    const fn character(major: i32, minor: Option<i32>) -> Self {
        Self { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: MKNOD | READ | WRITE }
    }

    fn of_spec(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let number = |number: Option<i64>| -> Result<Option<i32>> {
            match number {
                None | Some(-1) => Ok(None),
                Some(number) => i32::try_from(number).map(Some).map_err(|_| invalid(rule)),
            }
        };
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::P) => return Err(invalid(rule)),
        };
        let mut access = 0;
        for letter in rule.access().as_deref().filter(|text| !text.is_empty()).unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(invalid(rule)),
            };
        }
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access,
        })
    }

    /// The rule as instructions that fall through where it does not apply.
    fn compile(&self, program: &mut Vec<BpfInstruction>) {
        let mut tests = Vec::new();
        if let Some(kind) = self.kind {
            tests.push(vec![immediate(JUMP_NOT_EQUAL, TYPE, kind)]);
        }
        if self.access != MKNOD | READ | WRITE {
            let copy = register(MOVE_REGISTER, SCRATCH, ACCESS);
            let mask = immediate(AND, SCRATCH, self.access);
            // An allowance must cover all that is asked for; a denial strikes at any part of it.
            let unless = if self.allow {
                register(JUMP_NOT_EQUAL_REGISTER, SCRATCH, ACCESS)
            } else {
                immediate(JUMP_EQUAL, SCRATCH, 0)
            };
            tests.push(vec![copy, mask, unless]);
        }
        for (field, value) in [(MAJOR, self.major), (MINOR, self.minor)] {
            if let Some(value) = value {
                tests.push(vec![immediate(JUMP_NOT_EQUAL, field, value)]);
            }
        }
        let verdict = [immediate(MOVE, RESULT, i32::from(self.allow)), immediate(EXIT, 0, 0)];
        let mut block: Vec<BpfInstruction> = tests.into_iter().flatten().chain(verdict).collect();
        let end = block.len();
        for (index, instruction) in block.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_EQUAL | JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER) {
                // A block has eight instructions at most.
                instruction.offset = (end - index - 1) as i16;
            }
        }
        program.append(&mut block);
    }
}

/// The program for `rules`, of which a later one overrides an earlier one. What no rule names is denied.
///
/// # Errors
///
/// `InvalidSpec` for a rule that makes no sense.
pub fn compile(rules: &[LinuxDeviceCgroup]) -> Result<Vec<BpfInstruction>> {
    if rules.len() > MAX_RULES {
        return Err(Error::InvalidSpec(format!("more than {MAX_RULES} device rules")));
    }
    let mut compiled = rules.iter().map(Rule::of_spec).collect::<Result<Vec<_>>>()?;
    compiled.extend(ALWAYS_ALLOWED);
    // The context: access << 16 | type, major, minor.
    let mut program = vec![
        load(TYPE, 0),
        immediate(AND, TYPE, 0xffff),
        load(ACCESS, 0),
        immediate(SHIFT_RIGHT, ACCESS, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in compiled.iter().rev() {
        rule.compile(&mut program);
        if rule.kind.is_none()
            && rule.access == MKNOD | READ | WRITE
            && rule.major.is_none()
            && rule.minor.is_none()
        {
            // It decides on everything; the verifier refuses code that cannot be reached.
            return Ok(program);
        }
    }
    program.extend([immediate(MOVE, RESULT, 0), immediate(EXIT, 0, 0)]);
    Ok(program)
}

fn invalid(rule: &LinuxDeviceCgroup) -> Error {
    Error::InvalidSpec(format!("device rule {rule:?}"))
}

fn load(destination: u8, offset: i16) -> BpfInstruction {
    BpfInstruction { code: LOAD_WORD, registers: CONTEXT << 4 | destination, offset, immediate: 0 }
}

fn immediate(code: u8, destination: u8, immediate: i32) -> BpfInstruction {
    BpfInstruction { code, registers: destination, offset: 0, immediate }
}

fn register(code: u8, destination: u8, source: u8) -> BpfInstruction {
    BpfInstruction { code, registers: source << 4 | destination, offset: 0, immediate: 0 }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What the kernel's machine does with a program, as far as these programs go.
    fn run(program: &[BpfInstruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut registers = [0_i64; 11];
        let mut next = 0;
        loop {
            let instruction = program[next];
            let to = usize::from(instruction.registers & 0xf);
            let from = usize::from(instruction.registers >> 4);
            let value = i64::from(instruction.immediate);
            next += 1;
            let jump = match instruction.code {
                LOAD_WORD => {
                    assert_eq!(from, usize::from(CONTEXT));
                    registers[to] = i64::from(context[instruction.offset as usize / 4]);
                    false
                }
                MOVE => {
                    registers[to] = value;
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                AND => {
                    registers[to] &= value;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= value;
                    false
                }
                JUMP_EQUAL => registers[to] == value,
                JUMP_NOT_EQUAL => registers[to] != value,
                JUMP_NOT_EQUAL_REGISTER => registers[to] != registers[from],
                EXIT => return registers[0] != 0,
                other => panic!("operation {other:#x}"),
            };
            if jump {
                next += usize::try_from(instruction.offset).unwrap();
            }
        }
    }

    fn program(rules: Value) -> Vec<BpfInstruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        compile(&rules).unwrap()
    }

    const RW: i32 = READ | WRITE;

    #[test]
    fn without_rules_only_harmless_devices_are_allowed() {
        let program = program(json!([]));

        assert!(run(&program, CHARACTER, RW, 1, 3), "/dev/null");
        assert!(run(&program, CHARACTER, RW, 136, 7), "/dev/pts/7");
        assert!(run(&program, BLOCK, MKNOD, 8, 0), "mknod");
        assert!(!run(&program, BLOCK, READ, 8, 0), "a disk");
        assert!(!run(&program, CHARACTER, READ, 1, 11), "/dev/kmsg");
        assert!(!run(&program, CHARACTER, READ, 1, 1), "/dev/mem");
        assert!(!run(&program, CHARACTER, RW, 5, 1), "the guest's console");
        assert!(!run(&program, BLOCK, RW, 1, 3), "a block device with a harmless number");
    }

    #[test]
    fn a_later_rule_overrides_an_earlier_one() {
        let program = program(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "access": "rw"},
            {"allow": false, "type": "c", "major": 10, "minor": 5, "access": "w"},
        ]));

        assert!(run(&program, CHARACTER, RW, 10, 4));
        assert!(run(&program, CHARACTER, READ, 10, 5));
        assert!(!run(&program, CHARACTER, WRITE, 10, 5));
        assert!(!run(&program, CHARACTER, RW, 10, 5));
        assert!(!run(&program, CHARACTER, RW, 11, 4));
    }

    #[test]
    fn an_allowance_covers_all_that_is_asked_for() {
        let program = program(json!([{"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"}]));

        assert!(run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, RW, 8, 0));
    }

    #[test]
    fn a_privileged_container_may_use_everything_and_nothing_unreachable_follows() {
        let program = program(json!([{"allow": false}, {"allow": true, "type": "a", "access": "rwm"}]));

        assert!(run(&program, BLOCK, RW | MKNOD, 259, 4095));
        let exits = program.iter().filter(|instruction| instruction.code == EXIT).count();
        assert_eq!(exits, ALWAYS_ALLOWED.len() + 1);
    }

    #[test]
    fn rules_without_sense_are_refused() {
        for rule in [
            json!({"allow": true, "type": "p"}),
            json!({"allow": true, "access": "rx"}),
            json!({"allow": true, "major": 1_i64 << 40}),
        ] {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json!([rule])).unwrap();
            assert!(matches!(compile(&rules), Err(Error::InvalidSpec(_))), "{rule}");
        }
    }
}
