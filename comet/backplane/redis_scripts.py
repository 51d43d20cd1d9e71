"""What Redis does at once: the scripts of a channel, and how they are called and answered.

Neighbours: `comet.backplane.redis`, who calls them; `comet.backplane.redis_format`, which reads their answers;
`comet.backplane.redis_link`, which sends them by their digest. What is kept of a channel, all under its hash tag
(`redis_format.Names`), so that a cluster has it on one server:

- *the log*, a hash: ``e`` the epoch, ``o`` the newest offset and ``t`` when it was ordered, ``s`` the subscribers in all
  processes, and by each process's id how many it has. It expires by itself: when nobody holds the channel after the linger time, else
  after `HOLD`, which those who hold it prolong. What a process that has died had counted is taken off by
  whoever publishes next, who knows the dead (`HEARTBEAT`). ``g`` is when messages of it went before their time, at the latest, if they
  did: that it was deleted, or rewound to where it was not there. It may be all that there is;
- *the stream*: a message an entry, whose id is ``<offset>-<milliseconds>``: so it is found by its offset and
  tells its age. It never outlives the log by more than its last message's age;
- an answer for each idempotency key, for as long as it is recognized.

A log that is made anew, for whatever reason, has another epoch and no stream. All numbers are text on the
way: Lua would round an epoch.

Who looks at a channel that is not there (`peek`) makes none. It stands at a place of no log then: epoch 0, and Redis' time. Who
goes on from there has missed nothing if no log can have come and gone since (`lacks`), and the one that is there has all its messages.
A log goes with its time, with a deletion (``g``), or with whatever Redis loses by itself: at a flush, an eviction, a restart, a
fail-over. So Redis keeps, a key a server, since when it has lost nothing (`whole`): ``<milliseconds> <run_id> <evicted_keys>``. A flush
takes this key along; of a restart and an eviction INFO knows. It is looked up in the script that answers, so a Redis that lost everything a
moment ago does not say otherwise. If INFO is refused (ACL), that can't be known, and a gap is told.

What a stranger has put under one of these keys, of another type or with fields that comet never writes, is no log and no stream: it goes
when it is met, as if Redis had evicted it (`known`, `ours`), and those who follow the channel are told, by something that cannot be read
(`redis_format.Malformed`). An entry that is missing amid a stream comes as an empty one, which cannot be read either.

A Redis that was rewound may have come as far again by the time at which somebody looks who knows: other messages stand at the
offsets that were lost. So who knows how far a log was knows the time of that message as well (`redis_format.Seen`), and it is another
log, too, where another message stands there (`vouch`).
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from comet.backplane.memory import Bounds
from comet.message import FRAMING

HOLD: Final = 600.0
"""Seconds that a held channel outlives those who hold it, should they all die: longer than any outage that is to go
unnoticed. They prolong it three times in that time."""

PAGE: Final = 128
"""Messages of history in one answer, at most."""

PAGE_BYTES: Final = 64 << 10
"""Bytes of them; one that is larger comes alone. A connection with subscriptions must not have more than 32 MB waiting
(Redis' client-output-buffer-limit): see `comet.backplane.redis_link.ROOM`."""

STEP: Final = 8
"""Messages that a script fetches at once, so that it does not take many more than go into a page."""

NOW: Final = "local t = redis.call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000)"
"""Redis' own clock, since those of many machines differ."""

_PRELUDE: Final = """
local LINGER, HOLD, SIZE, AGE, KEY_AGE, FRAMING, STEP = {linger}, {hold}, {size}, {age}, {key_age}, {framing}, {step}
local function now() {now} end
local function text(number) return string.format('%.0f', number) end

local function number(value)  -- of a field; nil where it is none of ours
  local n = tonumber(value or 0)
  if n and n > -2^53 and n < 2^53 and n == math.floor(n) then return n end
end

local function known(K)  -- epoch, offset, subscribers, time of the newest; nil where there is no log, false where it is none of ours
  local h = redis.pcall('HMGET', K, 'e', 'o', 's', 't')
  if h.err then return false end
  local e = h[1]
  if not e then return nil end
  local o, s, t = number(h[2]), number(h[3]), number(h[4])
  if #e > 15 or string.find(e, '%D') or e == '' or not (o and s and t) or o < 0 then return false end
  return e, o, s, t
end

local function strange(K)  -- tell those who follow the channel that something of it was none of ours
  redis.call('{publish}', K, '!')
end

local function ours(K, command, key, ...)  -- as redis.call; what is no stream of ours at `key` goes first. `K` as for `strange`, or nil
  local answer = redis.pcall(command, key, ...)
  if type(answer) == 'table' and answer.err then
    if string.find(answer.err, 'WRONGTYPE', 1, true) or string.find(answer.err, ' ID', 1, true) then  -- the last one leaves no next id
      redis.call('DEL', key)
      if K then strange(K) end
    end
    return redis.call(command, key, ...)
  end
  return answer
end

local RECEIPT, UNDER_WAY, SENT = '^%d+ %d+ %d+ %d+$', '^$', '^%d+ %d+$'

local function remembered(key, from, ...)  -- what is kept under an idempotency key, if from there on it is like one of these; or false
  local before = redis.pcall('GET', key)
  if type(before) == 'string' and #before >= from - 1 and #before <= 200 then
    for _, form in ipairs({{...}}) do
      if string.find(before, form, from) then return before end
    end
  end
  return false
end

local function open(K, L, epoch)  -- as known; a log is made where there is none
  local e, o, s, t = known(K)
  if e then return e, o, s, t end
  if e == false then
    redis.call('DEL', K)
    redis.call('HSET', K, 'g', text(now()))
    strange(K)
  end
  redis.call('HSET', K, 'e', epoch)
  redis.call('PEXPIRE', K, LINGER)
  redis.call('DEL', L)
  return epoch, 0, 0, 0
end

local function time(K, L, offset)  -- of the message that is kept there
  local entry = ours(K, 'XRANGE', L, text(offset), text(offset), 'COUNT', 1)[1]
  return entry and tonumber(string.match(entry[1], '%d+$'))
end

local function insist(K)  -- on what takes next to no memory, a count: behind any write Redis has memory for all
  redis.call('HDEL', K, '')
end

local function shorten(L, most)  -- the stream goes then, or earlier
  if redis.call('PTTL', L) > most then redis.call('PEXPIRE', L, most) end
end

local function last(K, L, most)  -- it stays as long as its last message would have stayed all along, but so many ms at most
  if redis.call('PTTL', L) < 0 then return end
  local entry = ours(K, 'XREVRANGE', L, '+', '-', 'COUNT', 1)[1]
  if not entry then return end
  local left = math.max(1, tonumber(string.match(entry[1], '%d+$')) + AGE - now())
  redis.call('PEXPIRE', L, math.min(most, left))
end

local function count(K, L, s, node, n)  -- this process has so many; the sum
  local old = number(redis.call('HGET', K, node))
  s = s + n - (old or 0)
  if n ~= old then
    old = old or 0
    if n > 0 then
      redis.call('HSET', K, node, n, 's', s)
    else
      redis.call('HDEL', K, node)
      redis.call('HSET', K, 's', s)
    end
  end
  if s > 0 then
    redis.call('PEXPIRE', K, HOLD)
    if old == 0 then last(K, L, AGE) end
  elseif old > 0 then
    redis.call('PEXPIRE', K, LINGER)
    shorten(L, LINGER)
  end
  return s
end

local function bury(K, L, s, dead)  -- without those who have died
  for node in string.gmatch(dead, '%S+') do
    if redis.call('HEXISTS', K, node) == 1 then s = count(K, L, s, node, 0) end
  end
  return s
end

local function oldest(K, L, o, before)  -- the offset before the oldest message that is kept; what is from `before` goes
  local low, first = o, ours(K, 'XRANGE', L, '-', '+', 'COUNT', 1)[1]
  if first then low = math.min(o, math.max(tonumber(string.match(first[1], '^%d+')) - 1, o - SIZE)) end
  local function aged(offset)
    local ms = time(K, L, offset)
    return ms and ms < before
  end
  if low < o and tonumber(string.match(first[1], '%d+$')) < before and aged(low + 1) then
    local a, b = low + 1, o + 1  -- one that goes, one that stays
    while b - a > 1 do
      local m = math.floor((a + b) / 2)
      if aged(m) then a = m else b = m end
    end
    redis.call('XTRIM', L, 'MINID', text(b))
    low = a
  end
  return low
end

local function append(K, L, e, o, pieces, ms, ttl)  -- order these now, at `ms`: kept, told to all; the new offset
  local n, ms = #pieces, text(ms)
  if SIZE > 0 then
    for i = 1, n do ours(K, 'XADD', L, text(o + i) .. '-' .. ms, 'm', pieces[i]) end
    redis.call('XTRIM', L, 'MAXLEN', '~', SIZE)
    if math.floor(o / 16) ~= math.floor((o + n) / 16) then oldest(K, L, o + n, ms - AGE) end
    redis.call('PEXPIRE', L, ttl)
  end
  redis.call('HSET', K, 'o', text(o + n), 't', ms)
  redis.call('{publish}', K, e .. ' ' .. text(o + 1) .. ' ' .. n .. ' ' .. ms .. '\\n' .. table.concat(pieces))
  return o + n
end

local function publish(K, L, e, o, s, pieces, ms)  -- append, which is a use
  append(K, L, e, o, pieces, ms, s > 0 and AGE or math.min(AGE, LINGER))
  if s <= 0 then redis.call('PEXPIRE', K, LINGER) end  -- last: see `insist`
end

local function whole(W)  -- since when this Redis has lost nothing by itself, nil where that is not known; and what it is called now, or nil
  local kept, server, stats = redis.pcall('GET', W), redis.pcall('INFO', 'server'), redis.pcall('INFO', 'stats')
  local run = type(server) == 'string' and string.match(server, 'run_id:(%x+)')
  local evicted = type(stats) == 'string' and string.match(stats, 'evicted_keys:(%d+)')
  if not (run and evicted) then return nil, nil end
  local this = run .. ' ' .. evicted
  local ms, which = string.match(type(kept) == 'string' and kept or '', '^(%d+) (.*)$')
  return which == this and tonumber(ms) or nil, this
end

local function keep_whole(W, ms, intact, this)  -- since when it is whole, for who stands at a place of no log from now on; see `whole`
  if intact then
    if redis.call('PTTL', W) < LINGER then redis.call('PEXPIRE', W, 2 * LINGER) end
  elseif this then  -- a Redis that is full refuses it: then nobody knows
    redis.pcall('SET', W, ms .. ' ' .. this, 'PX', 2 * LINGER)
  end
end

local function lacks(K, offset, intact)  -- whether a log may have come and gone since that time
  local ms, at = tonumber(offset), now()
  return ms > at or at - ms > LINGER or (number(redis.call('HGET', K, 'g')) or at) >= ms or not intact or intact > ms
end

local function since(K, L, W, e, o, t, epoch, offset, limit, room, ms)  -- see `redis_format.replay`; `ms` is what a `Seen` knows, or 0
  local start, gap, entries = o, 0, {{}}
  local least = room > 0 and 1 or 0  -- messages; below 0 it is as much room, but what does not fit does not come
  room = math.abs(room)
  if epoch ~= '' then
    local low = oldest(K, L, o, now() - AGE)
    start = low
    if epoch == '0' then
      if low > 0 or lacks(K, offset, whole(W)) then gap = 1 end
    elseif epoch ~= 'oldest' then
      start = tonumber(offset)
      if epoch ~= e or start < low or start > o then
        gap = 1
        local same = epoch ~= e and ms > 0 and start >= low and start <= o and (start == o and t or time(K, L, start)) == ms
        if not same then start = low end  -- else it has been rewound since, and what followed is in this log, too
      end
    end
    local at, last = start, math.min(o, start + limit)
    while at < last and room > 0 do
      local most = math.min(STEP, last - at)
      local lot = ours(K, 'XRANGE', L, text(at + 1), text(last), 'COUNT', most)
      for i = 1, #lot + 1 do
        local entry = lot[i]
        local offset = entry and tonumber(string.match(entry[1], '^%d+')) or #lot < most and last + 1 or 0
        while at + 1 < offset do  -- somebody has deleted these
          at = at + 1
          entries[at - start] = ''
        end
        if entry and offset == at + 1 then
          room = room - #entry[2][2] - FRAMING
          if room < 0 and at >= start + least then break end
          at = at + 1
          entries[at - start] = entry[2][2]
        end
      end
    end
  end
  return {{e, text(o), text(start), gap, text(t), entries}}
end

local function vouch(K, L, e, o, t, epoch, offset, ms, new)  -- as it is; or it was rewound, then another with what came since
  offset, ms = tonumber(offset), tonumber(ms)
  if e ~= epoch or offset == 0 then return e, o end
  if o >= offset then
    local there = o == offset and t or time(K, L, offset)
    if ms == 0 or not there or there == ms then return e, o end
  end
  if ms > 0 then oldest(K, L, o, ms + 1) else redis.call('DEL', L) end
  redis.call('HSET', K, 'e', new)
  redis.call('{publish}', K, 'G')
  return new, o
end
"""

_PUBLISH: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s = open(K, L, ARGV[1])
s = bury(K, L, s, ARGV[2])
local pieces = {}
for i = 3, #ARGV do pieces[i - 2] = ARGV[i] end
local ms = now()
publish(K, L, e, o, s, pieces, ms)
return {e, text(o), s, text(ms)}
"""

_PUBLISH_KEYED: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s
local answers, pieces, at, first, ms = {}, {}, 2, 0, now()
for i = 3, #ARGV, 2 do
  local digest, before = ARGV[i + 1], false
  if digest ~= '' then
    at = at + 1
    before = remembered(KEYS[at], 33, RECEIPT, UNDER_WAY, SENT)  -- the last two are of what was sent, so of another message
  end
  if before then
    local same = string.sub(before, 1, 32) == digest and string.find(before, RECEIPT, 33)
    answers[#answers + 1] = same and string.sub(before, 33) or '!'
  else
    if not e then
      e, o, s = open(K, L, ARGV[1])
      s, first = bury(K, L, s, ARGV[2]), o
    end
    o = o + 1
    pieces[#pieces + 1] = ARGV[i]
    local answer = e .. ' ' .. text(o) .. ' ' .. s .. ' ' .. text(ms)
    if digest ~= '' then redis.call('SET', KEYS[at], digest .. answer, 'PX', KEY_AGE) end
    answers[#answers + 1] = answer
  end
end
if e then publish(K, L, e, first, s, pieces, ms) end
return answers
"""

_SEND: Final = """
local answers, each, ms = {}, tonumber(ARGV[3]), now()
for i = 1, #KEYS, each do
  local K, L, mark = KEYS[i], KEYS[i + 1], KEYS[i + 2]
  local answer = each == 3 and remembered(mark, 1, RECEIPT) or ''
  if answer == '' then
    local e, o, s = known(K)
    if e then
      s = bury(K, L, s, ARGV[1])
      local ttl = s > 0 and AGE or math.min(AGE, math.max(1, redis.call('PTTL', K)))
      answer = e .. ' ' .. text(append(K, L, e, o, {ARGV[2]}, ms, ttl)) .. ' ' .. s .. ' ' .. text(ms)
      if each == 3 then redis.call('SET', mark, answer, 'PX', KEY_AGE) end
    end
  end
  answers[#answers + 1] = answer
end
return answers
"""

_CLAIM: Final = """
local before = remembered(KEYS[1], 33, UNDER_WAY, SENT, RECEIPT)
if not before then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', KEY_AGE)
  return ''
end
return string.sub(before, 1, 32) == ARGV[1] and string.sub(before, 33) or '!'
"""

_JOIN: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s, t = open(K, L, ARGV[1])
if ARGV[9] ~= '-1' then insist(K) end  -- who has been here before
e, o = vouch(K, L, e, o, t, ARGV[9], ARGV[10], ARGV[11], ARGV[1])
bury(K, L, count(K, L, s, ARGV[3], tonumber(ARGV[4])), ARGV[2])
return since(K, L, KEYS[3], e, o, t, ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[12]), tonumber(ARGV[8]))
"""

_PEEK: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s, t = known(K)
if not e then
  local ms, intact, this = text(now()), whole(KEYS[3])
  local lost = ARGV[1] ~= '' and ARGV[1] ~= 'oldest' and (ARGV[1] ~= '0' or e == false or lacks(K, ARGV[2], intact))
  keep_whole(KEYS[3], ms, intact, this)
  return {'0', ms, ms, lost and 1 or 0, '0', {}}
end
if s <= 0 then  -- a use: it lingers anew
  redis.call('PEXPIRE', K, LINGER)
  last(K, L, LINGER)
end
return since(K, L, KEYS[3], e, o, t, ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), 0)
"""

_HOLD: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s = known(K)
if e ~= ARGV[3] then return -1 end
insist(K)
bury(K, L, count(K, L, s, ARGV[1], tonumber(ARGV[2])), ARGV[4])
return o
"""

_VOUCH: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, _, t = known(K)
if e then vouch(K, L, e, o, t, ARGV[2], ARGV[3], ARGV[4], ARGV[1]) end
return 1
"""

_READ: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, _, t = known(K)
if not e then return false end
return since(K, L, KEYS[3], e, o, t, ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), 0)
"""

_INFO: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s = known(K)
if not e then return false end
return {e, text(o), bury(K, L, s, ARGV[1]), o - oldest(K, L, o, now() - AGE)}
"""

_DELETE: Final = """
local K, L = KEYS[1], KEYS[2]
local e, o, s = known(K)
if not e then return false end
local answer = {e, text(o), bury(K, L, s, ARGV[1]), o - oldest(K, L, o, now() - AGE)}
redis.call('DEL', K, L)
redis.call('HSET', K, 'g', text(now()))
redis.call('PEXPIRE', K, LINGER)
redis.call('%(publish)s', K, 'D ' .. e)
return answer
"""

_HEARTBEAT: Final = """
local ms = now()
redis.call('PEXPIRE', KEYS[1], ARGV[3])  -- first, as `insist`: of a Redis that is full nobody is dead
local before = ours(nil, 'ZSCORE', KEYS[1], ARGV[1])
local gone = before and ms - before > tonumber(ARGV[2])  -- it stays so, for all: it comes back under another id
if not gone then redis.call('ZADD', KEYS[1], ms - ARGV[4], ARGV[1]) end
local dead = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', text(ms - ARGV[2]))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(ms - ARGV[3]))
if not before then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
redis.call('%(publish)s', KEYS[1], '')  -- nobody listens: it fails where nothing may be published
return {gone and 'dead' or before and 'alive' or 'new', table.concat(dead, ' ')}
"""


class Script:
    """A Lua script; `digest` is what it is called by once it is loaded."""

    __slots__ = ("digest", "text")

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.digest = hashlib.sha1(self.text).hexdigest().encode()  # noqa: S324 - Redis names them so

    def command(self, keys: Sequence[bytes], arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What calls it."""
        return (b"EVALSHA", self.digest, len(keys), *keys, *arguments)


class Scripts:
    """All of them, for these bounds. `sharded` is how a cluster publishes. Times are Redis' `now`."""

    def __init__(self, bounds: Bounds, sharded: bool, now: str = NOW) -> None:
        publish = "SPUBLISH" if sharded else "PUBLISH"
        times = {"linger": bounds.linger, "hold": HOLD, "age": bounds.history_age, "key_age": bounds.key_age}
        prelude = _PRELUDE.format(
            now=now,
            publish=publish,
            size=bounds.history_size,
            framing=FRAMING,
            step=STEP,
            **{name: max(1, round(1000 * value)) for name, value in times.items()},
        )

        def script(text: str) -> Script:
            return Script(prelude + text)

        self.publish = script(_PUBLISH)
        self.publish_keyed = script(_PUBLISH_KEYED)
        self.send = script(_SEND)
        self.claim = script(_CLAIM)
        self.join = script(_JOIN)
        self.hold = script(_HOLD)
        self.vouch = script(_VOUCH)
        self.peek = script(_PEEK)
        self.read = script(_READ)
        self.info = script(_INFO)
        self.delete = script(_DELETE % {"publish": publish})
        self.heartbeat = script(_HEARTBEAT % {"publish": publish})
        self.all: Sequence[Script] = list(vars(self).values())
        self.by_digest = {one.digest: one for one in self.all}
