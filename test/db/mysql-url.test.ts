import { describe, expect, it } from 'vitest';
import { parseMysqlUrl } from '../../src/db/connection.js';

describe('parseMysqlUrl', () => {
  it('reads every part, decoded', () => {
    expect(parseMysqlUrl('mysql://user%40x:p%2Fw%3A@db.example:3307/hold%20fast?tls=required')).toEqual({
      host: 'db.example',
      port: 3307,
      user: 'user@x',
      password: 'p/w:',
      database: 'hold fast',
      isTls: true,
    });
    expect(parseMysqlUrl('mariadb://root@localhost/h')).toMatchObject({
      port: 3306,
      password: '',
      isTls: false,
    });
  });

  it.each([
    ['nothing', ''],
    ['another scheme', 'postgres://secret@h/d'],
    ['no database', 'mysql://u:secret@h'],
    ['an unknown parameter', 'mysql://u:secret@h/d?ssl=1'],
    ['an unknown TLS mode', 'mysql://u:secret@h/d?tls=maybe'],
  ])('refuses %s without repeating the password', (_what, url) => {
    let error: unknown;
    try {
      parseMysqlUrl(url);
    } catch (caught) {
      error = caught;
    }
    expect(error).toMatchObject({ code: 'CONFIG_INVALID', details: { key: 'database.url' } });
    expect(String(error)).not.toContain('secret');
  });
});
