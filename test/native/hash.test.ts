import { createHash } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { HASH_BYTES, hashBlock, libnbdVersion, type HashAlgorithm } from '../../native/lib/index.js';

const PRIME32 = 2_654_435_761n;
const PRIME64 = 11_400_714_785_074_694_797n;

/** The buffer of xxHash's own sanity check (cli/xsum_sanity_check.c). */
function sanityBuffer(length: number): Buffer {
  const buffer = Buffer.alloc(length);
  let generator = PRIME32;
  for (let at = 0; at < length; at++) {
    buffer[at] = Number(generator >> 56n);
    generator = BigInt.asUintN(64, generator * PRIME64);
  }
  return buffer;
}

describe('XXH3-128', () => {
  // Canonical form: high 64 bits first, from the table XSUM_XXH128_testdata with seed 0.
  test.each([
    [0, '99aa06d3014798d86001c324468d497f'],
    [1, 'a6cd5e9392000f6ac44bdff4074eecdb'],
    [6, '082afe0b8162d12a3e7039bdda43cfc6'],
    [12, '6e3efd8fc7802b18061a192713f69ad9'],
  ])('the published vector of %d bytes', (length, expected) => {
    expect(hashBlock('xxh3-128', sanityBuffer(length)).toString('hex')).toBe(expected);
  });
});

describe('SHA-256', () => {
  test.each([0, 1, 63, 64, 65_536, 65_537])('%d bytes hash as with node:crypto', (length) => {
    const data = Buffer.alloc(length, 0x5a);
    expect(hashBlock('sha-256', data).equals(createHash('sha256').update(data).digest())).toBe(true);
  });
});

test('lengths are as the table says, and what is no hash or no buffer is refused', () => {
  for (const [name, bytes] of Object.entries(HASH_BYTES)) {
    expect(hashBlock(name as HashAlgorithm, Buffer.from('x'))).toHaveLength(bytes);
  }
  expect(() => hashBlock('md5' as HashAlgorithm, Buffer.alloc(1))).toThrow(TypeError);
  expect(() => hashBlock('toString' as HashAlgorithm, Buffer.alloc(1))).toThrow(TypeError);
  expect(() => hashBlock('sha-256', 'text' as unknown as Buffer)).toThrow(TypeError);
});

test('libnbd is 1.14 or newer', () => {
  const [major = 0, minor = 0] = libnbdVersion().split('.').map(Number);
  expect(major * 1000 + minor).toBeGreaterThanOrEqual(1014);
});
