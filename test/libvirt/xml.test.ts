import { describe, expect, it } from 'vitest';
import { MIB } from '../../src/lib/units.js';
import {
  attributeOf,
  childAt,
  childElements,
  parseXml,
  rootElement,
  serializeXml,
  textOf,
} from '../../src/libvirt/xml.js';

const refused = expect.objectContaining({ code: 'SOURCE_FORMAT' }) as unknown;

describe('XML', () => {
  it('is read by path, with text and attributes unescaped', () => {
    const root = rootElement(parseXml(`<a><b c='x &amp; y'> t&lt; </b><b/><d b='1'/></a>`), 'a');
    expect(attributeOf(childAt(root, 'b'), 'c')).toBe('x & y');
    expect(textOf(childAt(root, 'b'))).toBe('t<');
    expect(childElements(root, 'b')).toHaveLength(2);
    expect(childAt(root, 'd', 'b')).toBeNull();
    expect(textOf(childElements(root, 'b')[1])).toBeNull();
  });

  it('comes back escaped', () => {
    const document = parseXml('<a/>');
    document.documentElement?.setAttribute('b', `<"'&`);
    expect(parseXml(serializeXml(document)).documentElement?.getAttribute('b')).toBe(`<"'&`);
  });

  it.each([
    ['', 'nothing'],
    ['<a>', 'an open element'],
    ['<a></b>', 'a wrong end'],
    ['<a b=1/>', 'an attribute without quotes'],
    ['<a/><b/>', 'two roots'],
    ['<x:a/>', 'an unbound prefix'],
    ['<a>&undefined;</a>', 'an unknown entity'],
    ['<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>', 'an entity of its own'],
    ['<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', 'an external document type'],
  ])('is refused: %s (%s)', (text) => {
    expect(() => parseXml(text)).toThrow(refused);
  });

  it('is refused when it is nested too deep or too large', () => {
    const nested = (depth: number) => `${'<a>'.repeat(depth)}${'</a>'.repeat(depth)}`;
    expect(parseXml(nested(128)).documentElement?.nodeName).toBe('a');
    expect(() => parseXml(nested(129))).toThrow(/nested deeper/);
    expect(() => parseXml(nested(20_000))).toThrow(/nested deeper/);
    expect(() => parseXml(`<a>${'x'.repeat(4 * MIB)}</a>`)).toThrow(/larger than/);
  });

  it('must be what was asked for', () => {
    expect(() => rootElement(parseXml('<domainsnapshot/>'), 'domain')).toThrow(refused);
  });
});
